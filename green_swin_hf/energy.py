"""Electricity of a run as codecarbon estimates it; the package is optional (`pip install green-swin-hf[energy]`)."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import logging
import os
from typing import Any

NO_COUNTRY = "none"  # energy alone: what it emits depends on where the electricity comes from


def add_energy_flag(parser: argparse._ActionsContainer) -> None:
    """`--track-energy [COUNTRY]`; None where it is not given."""
    parser.add_argument(
        "--track-energy",
        nargs="?",
        const=NO_COUNTRY,
        metavar="COUNTRY",
        help="estimate the energy with codecarbon; with a country (three letters such as DEU) also what it emits",
    )


class EnergyMeter:
    """Estimates the energy of this machine from its making to `stop`, and with a country what it emits.

    Args:
        country: three letters (ISO 3166-1, such as `DEU`), whose mix of electricity is taken; `NO_COUNTRY` for none.

    Raises:
        ValueError: codecarbon is not installed, or the country is unknown to it.
    """

    def __init__(self, country: str = NO_COUNTRY):
        check_energy(country)
        from codecarbon import OfflineEmissionsTracker

        self.country = None if country == NO_COUNTRY else country.upper()
        # It stops on errors of its own without a word: a run does not end because its energy cannot be estimated.
        self._tracker: Any = OfflineEmissionsTracker(
            country_iso_code=self.country or "USA", output_methods=[], log_level="critical", allow_multiple_runs=True
        )
        self._tracker.start()

    def stop(self) -> dict[str, Any]:
        """`kwh`, `co2_eq_grams` (with a country), `country` and `source`; nothing where it could not be estimated."""
        with contextlib.suppress(Exception):
            self._tracker.stop()
        found = getattr(self._tracker, "final_emissions_data", None)
        if found is None or not found.energy_consumed:
            return {}
        version = importlib.metadata.version("codecarbon")
        estimate = {"kwh": found.energy_consumed, "source": f"codecarbon {version}, an estimate for the whole machine"}
        if self.country is None:
            return estimate
        return {**estimate, "co2_eq_grams": 1000 * found.emissions, "country": self.country}


def check_energy(country: str | None) -> None:
    """Raise a `ValueError` unless energy, where asked for, can be estimated with the electricity of a country."""
    if country is None:
        return
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != os.environ.get("LOCAL_WORLD_SIZE", processes):
        raise ValueError("--track-energy sees one machine, and this run has more; leave it out")
    if importlib.util.find_spec("codecarbon") is None:
        raise ValueError("--track-energy needs the package codecarbon; install it: pip install codecarbon")
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    from codecarbon.input import DataSource

    if country != NO_COUNTRY and country.upper() not in DataSource().get_global_energy_mix_data():
        raise ValueError(
            f"--track-energy {country} is no country that codecarbon knows; give three letters such as DEU, or none "
            "for the energy without what it emits"
        )


__all__ = ["NO_COUNTRY", "EnergyMeter", "add_energy_flag", "check_energy"]
