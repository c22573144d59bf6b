"""RandAugment, which is timm's, drawn from our own generator."""

from __future__ import annotations

import re

import numpy as np
from PIL import Image

from fdscale.config.errors import UserError
from fdscale.data.draws import global_generators

TRANSLATED = 0.45  # of the image's side at most, as timm sets it up for training
POLICY = re.compile(r"rand(-(m\d+|n[1-9]\d*|p(0?\.\d+|[01](\.0)?)|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t(weights|3aw?)))*")


class RandAugment:
    """timm's RandAugment of a policy such as `rand-m9-mstd0.5-inc1`, as `timm.data.create_transform` sets it up.

    `mean` (in [0, 1]) is the colour of what is shifted into the image, `resample` the filter of rotations and shears.
    """

    def __init__(self, policy: str, image_size: int, mean: tuple[float, ...], resample: Image.Resampling) -> None:
        """Raises UserError for a policy that timm would refuse, or read in part and say nothing."""
        refuse_unknown_policy(policy)
        from timm.data.auto_augment import rand_augment_transform  # it brings torch, which `fdscale check` has not

        hparams = {
            "translate_const": int(image_size * TRANSLATED),
            "img_mean": tuple(min(255, round(255 * value)) for value in mean),
            "interpolation": resample,
        }
        self.transform = rand_augment_transform(policy, hparams)

    def __call__(self, image: Image.Image, draw: np.random.Generator) -> Image.Image:
        """An RGB image distorted, of the same size; timm's draws come from `draw` alone."""
        with global_generators(draw):
            return self.transform(image)


def refuse_unknown_policy(policy: str) -> None:
    """Raise UserError for a policy that timm would refuse, or read in part and say nothing."""
    if not POLICY.fullmatch(policy):
        raise UserError(
            f"augment.randaugment: got '{policy}', allowed: timm's policies, 'rand' and sections mN (magnitude), "
            "nN (layers), pX (probability), mstdX, mmaxN, inc0 or inc1, tweights, t3a or t3aw, "
            "for example 'rand-m9-mstd0.5-inc1'"
        )
