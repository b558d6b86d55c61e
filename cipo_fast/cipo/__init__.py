"""CIPO, reconstructed from the published descriptions of arXiv 2605.14539, as pure functions.

anchors.py   which attempts are shown back          prompts.py   how they are shown
replay.py    rho, the share of right anchors        advantages.py  rewards to advantages, risk shaping
objective.py advantages to per-token loss weights   nudge.py    rollouts with strategy hints (NudgeRL)
"""
