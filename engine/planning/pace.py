"""How fast the machine is now against when it was calibrated, as the steps that serve show it."""

import msgspec


class Pace(msgspec.Struct, frozen=True):
    """The time of recent steps by what their calibration says of them."""

    ratio: float  # above 1: the machine is slower than it was
    since_s: float  # Unix time of the first of these steps
    num_steps: int
