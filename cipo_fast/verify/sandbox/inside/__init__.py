"""What runs inside the sandbox. Standard library only, relative imports only: the folder is mounted there alone."""
