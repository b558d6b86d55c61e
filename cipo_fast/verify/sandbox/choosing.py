"""Which tier it is: tried, not guessed."""

from __future__ import annotations

from cipo_fast.config import SandboxConfig
from cipo_fast.errors import UserError
from cipo_fast.verify.sandbox.tiers import Tier, find_bubblewrap


def choose(config: SandboxConfig) -> Tier:
    bwrap = find_bubblewrap()
    if bwrap:
        return Tier("bubblewrap", bwrap, ["own namespaces"])
    raise UserError("no sandbox")
