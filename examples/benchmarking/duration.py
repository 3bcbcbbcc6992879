"""A rough forecast of how long all parts take, from the rate of one matrix product on this machine."""

import argparse

from benchmarking.options import choose_batch
from benchmarking.rates import measure_rate

# Multiply-adds of stock Swin for one image of 224 px, in billions.
DENSE_GMACS = {"tiny": 4.5, "small": 8.7, "base": 15.4, "large": 34.5, "micro": 0.03}
# A step of the dense baseline as a share of the rate of a large product, and how many such steps the parts amount to
# at the default number of rounds: those run in each precision, and those run in fp32 only.
EFFICIENCY = 0.3
STEPS_OF_EACH_PRECISION, STEPS_OF_ONE = 100, 150


def forecast_seconds(arguments: argparse.Namespace) -> float:
    """Seconds of all parts, right to a factor of about two."""
    total = 0.0
    for precision in arguments.precision:
        steps = STEPS_OF_EACH_PRECISION + (STEPS_OF_ONE if precision == "fp32" else 0)
        rate = EFFICIENCY * measure_rate(arguments.device, precision)
        for variant in arguments.variants:
            for size in arguments.sizes:
                images = choose_batch(arguments, variant, size) * size**2 / 224**2
                total += steps * 6e9 * DENSE_GMACS[variant] * images / rate
    return total * arguments.rounds / 7


def describe_duration(seconds: float) -> str:
    """
    >>> describe_duration(100), describe_duration(5000)
    ('about 2 minutes', 'about 1.4 hours')
    """
    return f"about {seconds / 3600:.1f} hours" if seconds > 3600 else f"about {max(1, round(seconds / 60))} minutes"
