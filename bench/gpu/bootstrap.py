"""Imported before cipo_kernels: in a checkout that is not installed, the folder kernels/ is that package."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("cipo_kernels") is None:
    init = Path(__file__).resolve().parents[2] / "kernels" / "__init__.py"
    spec = importlib.util.spec_from_file_location("cipo_kernels", init, submodule_search_locations=[str(init.parent)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["cipo_kernels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["cipo_kernels"])
