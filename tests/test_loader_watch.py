"""A loader's worker that dies or hangs: named with its sample, in time, and nothing of it left behind."""

import contextlib
import functools
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import time
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from green_swin_hf import loader_watch
from green_swin_hf.loader_watch import LoaderError, LoaderWatch, _DoneFlag, _WorkerNotes
from green_swin_hf.stop_signals import SIGNALS

TIMEOUT = 60.0


class Numbers(Dataset):
    """Samples that are their keys; one key brings trouble, later than workers get while the loader still starts."""

    def __init__(self, trouble=lambda: None, key=33):
        self.trouble, self.key = trouble, key

    def __len__(self):
        return 40

    def __getitem__(self, key):
        if key == self.key:
            self.trouble()
        return key

    def describe(self, key):
        return f"picture {key}.png"


class NumberStream(IterableDataset):
    def __init__(self, trouble):
        self.trouble = trouble

    def __iter__(self):
        for number in range(20):
            if number == 7:
                self.trouble()
            yield number


def signalled(name):
    return functools.partial(lambda number: os.kill(os.getpid(), number), getattr(signal, name))


def refuse():
    raise ValueError("no such picture")


def read_all(watch):
    with watch.explained():
        return torch.cat(list(watch)).tolist()


@pytest.mark.parametrize("trouble", [lambda: time.sleep(600), signalled("SIGSTOP")], ids=["waiting", "frozen"])
def test_a_worker_that_hangs_is_ended_and_named_with_its_sample(trouble):
    watch = LoaderWatch(Numbers(trouble), num_workers=2, timeout=1, batch_size=4)
    began = time.monotonic()
    with pytest.raises(LoaderError, match=r"worker hung and was ended: .*\(worker_timeout 1\)") as caught:
        read_all(watch)
    assert "was on picture 33.png (key 33), taken" in str(caught.value)
    assert time.monotonic() - began < 60  # seconds; a busy machine starts processes slowly
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        pytest.param(signalled("SIGKILL"), "SIGKILL: perhaps memory ran out", id="killed"),
        pytest.param(signalled("SIGUSR2"), "SIGUSR2", id="signalled"),
        pytest.param(lambda: os._exit(3), "exit code 3", id="exited"),
    ],
)
def test_a_worker_that_dies_is_named_with_its_sample(trouble, said):
    watch = LoaderWatch(Numbers(trouble), num_workers=2, timeout=TIMEOUT, batch_size=4)
    where = r"process \d+ was on picture 33.png \(key 33\), taken"
    with pytest.raises(LoaderError, match=rf"worker died \({said}\): {where}"):
        read_all(watch)
    assert multiprocessing.active_children() == []


def slow_collate(samples):
    time.sleep(600 if 33 in samples else 0)
    return torch.tensor(samples)


def test_what_hangs_outside_of_samples_is_told_later():
    watch = LoaderWatch(Numbers(), num_workers=1, timeout=0.2, batch_size=4, collate_fn=slow_collate)
    with pytest.raises(LoaderError, match=r"no batch came for 2 seconds \(10 x worker_timeout\)"):
        read_all(watch)
    assert multiprocessing.active_children() == []


def test_a_stream_is_watched_too():
    watch = LoaderWatch(NumberStream(signalled("SIGKILL")), num_workers=1, timeout=TIMEOUT, batch_size=1)
    with pytest.raises(LoaderError, match=r"was on the image after the first 7 of its share of the stream"):
        read_all(watch)


def first_batch_then_no_worker(watch):
    """The iterator after its first batch, when all workers were killed and this process has heard of it."""
    batches = iter(watch)
    next(batches)
    for worker in multiprocessing.active_children():
        worker.kill()
        while worker.exitcode is None:
            time.sleep(0.01)
    time.sleep(0.1)  # a pending handler would run here
    return batches


def work_then_ask(watch, done):
    batches = first_batch_then_no_worker(watch)
    done.append("work")
    next(batches)


def test_the_end_of_a_worker_interrupts_nothing_else_and_shows_at_the_next_batch():
    """As where a checkpoint is being written meanwhile."""
    watch, done = LoaderWatch(Numbers(), num_workers=2, timeout=TIMEOUT, batch_size=1), []
    with pytest.raises(LoaderError, match=r"died .*SIGKILL"), watch.explained():
        work_then_ask(watch, done)
    assert done == ["work"]
    assert multiprocessing.active_children() == []


def read_another(loader, watch):
    batches = iter(watch)
    next(batches)
    list(loader)


def test_the_end_of_another_loaders_worker_is_told_in_one_line():
    """As of the probe's or the validation's loader, within a pass of the training's."""
    watch = LoaderWatch(Numbers(), num_workers=1, timeout=TIMEOUT, batch_size=4)
    other = DataLoader(Numbers(signalled("SIGKILL")), num_workers=1)
    with pytest.raises(LoaderError, match="DataLoader worker"), watch.explained():
        read_another(other, watch)


def test_pytorch_hears_of_children_that_are_not_watched():
    watch, heard = LoaderWatch(Numbers(), num_workers=1, timeout=TIMEOUT, batch_size=4), []
    with watch.explained():
        batches = iter(watch)
        next(batches)
        pytorchs, watch._handler = watch._handler, lambda number, frame: heard.append(number)
        other = multiprocessing.get_context("fork").Process(target=os._exit, args=(3,))
        other.start()
        other.join()
        watch._handler = pytorchs
    assert heard


def test_a_watch_within_another_one_tells_of_its_own_worker():
    outer = LoaderWatch(Numbers(), num_workers=1, timeout=TIMEOUT, batch_size=4)
    inner = LoaderWatch(Numbers(signalled("SIGKILL")), num_workers=1, timeout=TIMEOUT, batch_size=4)
    with outer.explained():
        batches = iter(outer)
        next(batches)
        with pytest.raises(LoaderError, match=r"died .*picture 33"):
            read_all(inner)
    assert multiprocessing.active_children() == []


def write_in_vain(watch):
    first_batch_then_no_worker(watch)
    raise OSError("cannot be written")


def test_the_end_of_a_worker_is_told_where_another_error_shows_first():
    """Closed connections of a worker raise, too, a moment before its end is known."""
    watch = LoaderWatch(Numbers(), num_workers=2, timeout=TIMEOUT, batch_size=1)
    with pytest.raises(LoaderError, match=r"died .*SIGKILL"), watch.explained():
        write_in_vain(watch)
    assert multiprocessing.active_children() == []


def test_a_worker_that_is_killed_in_the_lock_of_an_event_holds_nothing_up(monkeypatch):
    """As the other workers may be when one has died; PyTorch would wait for the lock when it ends its loader."""

    def die_in_it(event):
        with event._cond:
            os.kill(os.getpid(), signal.SIGKILL)

    def read_and_end():
        with contextlib.suppress(LoaderError):
            read_all(LoaderWatch(Numbers(signalled("SIGKILL")), num_workers=1, timeout=TIMEOUT, batch_size=4))
        os._exit(0)

    monkeypatch.setattr(multiprocessing.synchronize.Event, "is_set", die_in_it)
    process = multiprocessing.get_context("fork").Process(target=read_and_end)
    process.start()
    process.join(TIMEOUT)
    process.kill()
    assert process.exitcode == 0


def test_the_handler_of_children_is_put_back():
    list(LoaderWatch(Numbers(), num_workers=1, timeout=TIMEOUT, batch_size=4).loader)  # PyTorch sets its own once
    before = signal.getsignal(signal.SIGCHLD)
    assert read_all(LoaderWatch(Numbers(), num_workers=1, timeout=TIMEOUT, batch_size=4)) == list(range(40))
    assert signal.getsignal(signal.SIGCHLD) is before


def test_workers_leave_the_signals_of_a_queue_to_the_training_process():
    watch, seen = LoaderWatch(Numbers(), num_workers=1, timeout=TIMEOUT, batch_size=1), []
    with watch.explained():
        for batch in watch:
            seen += batch.tolist()
            for number in SIGNALS:
                os.kill(multiprocessing.active_children()[0].pid, number)
    assert seen == list(range(40))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_and_other_errors_come_as_they_are(num_workers):
    watch = functools.partial(LoaderWatch, num_workers=num_workers, timeout=TIMEOUT, batch_size=4)
    assert read_all(watch(Numbers())) == list(range(40))
    with pytest.raises(ValueError, match="no such picture"):
        read_all(watch(Numbers(refuse)))
    with pytest.raises(OSError, match="full"), watch(Numbers()).explained():
        raise OSError("disk full")
    assert multiprocessing.active_children() == []


def test_notes_are_shared_with_workers_that_are_not_forked():
    notes = _WorkerNotes(2)
    other = ForkingPickler.loads(ForkingPickler.dumps(notes))
    before = {number: signal.getsignal(number) for number in SIGNALS}
    other.begin(1)
    for number, handler in before.items():
        signal.signal(number, handler)
    other.take(5)
    (process, key, _), idle = notes.rows()[1], notes.rows()[0]
    assert (process, key) == (os.getpid(), 5)
    assert idle[0] == 0


def test_the_flag_is_shared_with_workers_that_are_not_forked():
    flag = _DoneFlag()
    other = ForkingPickler.loads(ForkingPickler.dumps(flag))
    assert not other.is_set()
    flag.set()
    assert other.is_set()


def test_workers_that_were_stopped_with_all_the_rest_are_not_hung(monkeypatch):
    """A queue that suspends a job, or Ctrl-Z: the clock goes on, and the watching thread wakes too late to judge."""
    monkeypatch.setattr(loader_watch, "_LATE_SECONDS", 0.2)
    watch = LoaderWatch(Numbers(lambda: time.sleep(2)), num_workers=1, timeout=0.5, batch_size=4)
    wait = watch._is_over.wait
    monkeypatch.setattr(watch._is_over, "wait", lambda seconds: wait(1))
    assert read_all(watch) == list(range(40))


def read_and_fail(watch):
    assert len(list(watch)) == 5
    raise OSError("disk full")


def test_workers_that_are_done_do_not_hide_another_error():
    watch = LoaderWatch(NumberStream(lambda: None), num_workers=1, timeout=TIMEOUT, batch_size=4)
    with pytest.raises(OSError, match="disk full"), watch.explained():
        read_and_fail(watch)
