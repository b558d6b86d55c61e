"""How good a policy is on held-out problems, alone and as its own corrector; explained in docs/evaluation.md.

`sample.py` asks, `records.py` keeps what was answered, `figures.py` makes numbers of it by `estimators.py`, `report.py`
writes them down, `model.py` finds the weights.
"""
