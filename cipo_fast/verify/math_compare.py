"""Whether an answer is the gold, by the comparator of the gold's class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cipo_fast.verify.math_fallback import math_verify_agrees
from cipo_fast.verify.math_policy import MathPolicy
from cipo_fast.verify.math_text import prepared


def agree(golds: list[str], answer: str, policy: MathPolicy, row: Mapping[str, Any]) -> bool:
    """Whether a prepared answer is what the golds ask for. Raises Refused for an answer that cannot be judged."""
    return math_verify_agrees(prepared(", ".join(golds)), answer)
