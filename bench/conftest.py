"""Set before torch is loaded, as train.py does: threads that spin long at barriers time the machine's other work."""

import os

os.environ["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "1000")
