"""`rlhf fetch`: builds or downloads assets."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.config import UserError
from rlhf.config.explain import shortened
from rlhf.data.assets import PREFIX, resolve


def fetch(assets: Sequence[str]) -> None:
    """Print where each asset lies. Raises UserError: a name of no asset, or it cannot be made."""
    for asset in assets:
        if not asset.startswith(PREFIX):
            raise UserError(
                f"`{shortened(asset)}` is no asset: these begin with `{PREFIX}`, such as asset:tiny-llama. Correct the name"
            )
    for asset in assets:
        print(resolve(asset))
