"""Set before torch is loaded, as train.py does: threads that spin at barriers time the machine's other work."""

import os

os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
