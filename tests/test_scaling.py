"""Runs on many GPUs, as far as they can be tried without: what is computed of them, and the files that launch them."""

import json
import os
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import scaling
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_multi_gpu_env
from test_sharding import FSDP

from green_swin_hf import GreenSwinConfig, GreenSwinForMaskedImageModeling

LAUNCH = Path(scaling.__file__).resolve().parent / "launch"
PARTS = scaling.Parts(
    parameters=10**8,
    flops=2e10,
    images_per_second=100,
    plan_seconds=0.001,
    checkpoint_bytes=10**9,
    checkpoint_seconds=1,
)
ASSUMED = {"gpu_tflops": 100.0, "link_within": 200.0, "link_between": 20.0, "disk": 1.0, "save_every": 1000}


def row(gpus, images_per_gpu=100, images_in_all=None):
    assumed = Namespace(**ASSUMED, images_per_gpu=images_per_gpu, images_in_all=images_in_all)
    return scaling.row_of(PARTS, assumed, gpus)


def test_one_gpu_computes_loads_saves_and_sends_nothing():
    one = row(1)
    assert one["computing, ms"] == pytest.approx(100 * 2e10 / 100e12 * 1e3)  # 20
    assert one["DDP sends, ms"] == one["FSDP sends, ms"] == 0
    assert one["loader cores per GPU"] == pytest.approx(100 / 0.020 * (0.010 + 0.001))
    assert one["DDP efficiency"] == pytest.approx(20 / 21)  # 1 s of saving in 1000 updates of 20 ms
    assert one["DDP state, GB per GPU"] == pytest.approx(1.6)


def test_what_is_sent_follows_the_rings_and_hides_behind_what_is_computed():
    eight, many = row(8), row(16)
    assert eight["DDP sends, ms"] == pytest.approx(2 * 4e8 * 7 / 8 / 200e9 * 1e3)  # 3.5
    assert eight["FSDP sends, ms"] == pytest.approx(1.5 * eight["DDP sends, ms"])
    assert eight["DDP efficiency"] == row(1)["DDP efficiency"]
    assert many["DDP sends, ms"] == pytest.approx(2 * 4e8 * 15 / 16 / 20e9 * 1e3)  # 37.5
    assert many["DDP efficiency"] == pytest.approx(20 / (20 / 3 + 37.5 + 1))
    assert many["FSDP state, GB per GPU"] == pytest.approx(1.6 / 16)


def test_a_fixed_number_of_images_is_shared_out():
    assert [row(gpus, images_in_all=2048)["images per update"] for gpus in scaling.GPUS] == [2048] * len(scaling.GPUS)
    assert row(2, images_in_all=2048)["computing, ms"] == pytest.approx(row(1, images_in_all=2048)["computing, ms"] / 2)


def test_operations_are_those_of_the_products():
    config = GreenSwinConfig(
        image_size=32, patch_size=2, num_channels=1, embed_dim=16, depths=[1, 1], num_heads=[1, 2], window_size=4,
        decoder_hidden_size=16, decoder_num_attention_heads=1, decoder_intermediate_size=32,
    )  # fmt: skip
    one = scaling.count_flops(GreenSwinForMaskedImageModeling(config), scaling.plan_maker(config))
    config.depths = [1, 2]
    two = scaling.count_flops(
        GreenSwinForMaskedImageModeling(GreenSwinConfig(**config.to_dict())), scaling.plan_maker(config)
    )
    # The further block of width 32: 12 * 32 * 32 products for a token, once forward and twice backward; and attention.
    tokens = 16 * 16 // 4 // 4
    assert 6 * 12 * 32 * 32 * tokens < two - one < 2 * 6 * 12 * 32 * 32 * tokens


def test_the_command_says_what_it_measured_and_refuses_wrong_input(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "measure", lambda config: PARTS)
    threads = torch.get_num_threads()
    assert scaling.main(["--output", str(tmp_path / "out.json")]) == 0
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "100.0 M parameters, 20.0 GFLOP" in said
    assert said.count("\n| ") == 1 + len(scaling.GPUS)
    assert json.loads((tmp_path / "out.json").read_text())["parts"]["flops"] == 2e10
    for words, message in (("--disk 0", "--disk 0.0 must be greater than 0"), ("--image-size 30", "image_size 30")):
        with pytest.raises(SystemExit, match="2"):
            scaling.main(words.split())
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line


@pytest.mark.parametrize("name", ["one_machine", "fsdp"])
def test_accelerate_reads_its_files_as_they_are_meant(name, monkeypatch):
    words = ["--config_file", str(LAUNCH / f"{name}.yaml"), "examples/pretrain.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert arguments.num_processes == 8
    assert arguments.mixed_precision == "no"
    assert arguments.use_fsdp == (name == "fsdp")
    if name == "fsdp":  # what `test_sharding` trains with
        made = prepare_multi_gpu_env(arguments)
        assert {key: made[key] for key in FSDP} == FSDP


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_slurm_script_starts_every_process_with_its_place_and_the_users_words(tmp_path):
    """With stand-ins for Slurm's own commands, and for Python, which tells what it was called with."""
    stand_ins = {
        # more than a pipe holds, so that a reader who closes it early shows
        "scontrol": "echo first-machine; for i in {2..9999}; do echo machine-$i; done",
        "srun": 'shift; shift\nfor i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@"; done',
        "python": 'echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT"\n'
        'printf "<%s>" "$@"; echo',
    }
    for name, code in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{code}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "m[1-2]", "SLURM_JOB_ID": "70001", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    slurm["SLURM_CPUS_PER_TASK"] = "3"
    variables = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["--data", "two words", "--epochs", "3"]
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sh", *words], capture_output=True, text=True, env=variables, check=True, timeout=60
    )
    called = "<examples/pretrain.py><--resume><auto><--data><two words><--epochs><3>"
    assert done.stdout.splitlines() == [
        "0/2 0/2 first-machine 30001", called, "1/2 1/2 first-machine 30001", called
    ]  # fmt: skip
