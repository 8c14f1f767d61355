"""When a worker is lost another one takes over, and the answer is the same."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("grpc", reason="the extra `workers` is not installed")

from cluster import CUTS, LONG, MB, PROMPT, WorkerProcess, one_machine, shared_engine, workers
from engines import assert_same, greedy

from runtime.distributed import wire
from runtime.distributed.cluster import Cluster
from runtime.distributed.journal import Snapshot
from runtime.distributed.link import Link, close_all, greet
from runtime.distributed.messages import BLOCK, PROTOCOL, Hello
from runtime.distributed.worker import build, cpu_class
from runtime.engine import code_pages
from runtime.errors import Cancelled, WorkerError
from runtime.llama.model_file import ModelFile


@pytest.fixture(scope="module")
def paths(tiny_model):
    """The models that the workers have."""
    return {arch: tiny_model(arch) for arch in ("llama", "qwen2", "gemma3")}


@pytest.fixture(scope="module")
def alone(paths):
    """alone(arch, prompt, n): the answer of one machine."""
    return one_machine(paths)


def test_a_worker_that_dies_is_one_clear_line_at_once(paths):
    with workers(1, [paths["llama"]]) as (worker,):
        with shared_engine(paths["llama"], [0] * 4, [worker.address], n_ubatch=64) as opened:
            opened.forward(PROMPT)
            threading.Timer(0.1, worker.process.kill).start()
            start = time.monotonic()
            with pytest.raises(WorkerError, match="is gone: it closed the connection;"):
                while time.monotonic() - start < 5:
                    opened.forward([1])
                    if opened.n_past > 400:
                        opened.truncate(20)
        assert time.monotonic() - start < 1.1


@pytest.mark.parametrize("cut", ["halves", "three", "ring", "root between"])
@pytest.mark.parametrize("who", ["spare", "survivor"])
@pytest.mark.parametrize("dies", [0, 1])
def test_another_worker_takes_over_and_the_answer_is_the_same(cut, who, dies, paths, alone):
    owners = CUTS[cut]
    n, expected = 1 + max(o for o in owners if o is not None), alone("qwen2", LONG, 24)
    with workers(n + (who == "spare"), [paths["qwen2"]]) as found:
        addresses = [worker.address for worker in found]
        with shared_engine(paths["qwen2"], owners, addresses[:n], spares=addresses[n:], n_ubatch=64) as opened:

            def die(i):
                if i == 12:
                    found[dies].process.kill()

            assert_same(greedy(opened, LONG, 24, before_token=die), expected)
            assert sum(link.replacements for link in opened.cluster.links) == 1


@pytest.fixture
def replayed(monkeypatch):
    """The positions at which passes begin that are computed again."""
    found, replay = [], Cluster._replay_pass

    def counted(cluster, entry, fresh, until):
        found.append(entry.part.first)
        replay(cluster, entry, fresh, until)

    monkeypatch.setattr(Cluster, "_replay_pass", counted)
    return found


@pytest.mark.parametrize("arch", ["qwen2", "gemma3"])
@pytest.mark.parametrize("cut", ["three", "ring"])
@pytest.mark.parametrize("who", ["spare", "survivor"])
def test_only_what_is_behind_the_snapshot_is_computed_again(arch, cut, who, paths, alone, replayed):
    """Four passes of a prompt of 220 tokens and 50 of one token were there."""
    owners = CUTS[cut]
    n, expected = 1 + max(o for o in owners if o is not None), alone(arch, LONG, 60)
    with workers(n + (who == "spare"), [paths[arch]]) as found:
        addresses = [worker.address for worker in found]
        with shared_engine(paths[arch], owners, addresses[:n], spares=addresses[n:], n_ubatch=64) as opened:

            def die(i):
                if i == 50:
                    found[0].process.kill()

            assert_same(greedy(opened, LONG, 60, before_token=die), expected)
            assert sum(link.replacements for link in opened.cluster.links) == 1
    assert 0 < len(replayed) <= 2 * BLOCK
    assert replayed[0] >= 220 + 50 - 2 * BLOCK


def test_a_worker_is_lost_while_the_snapshot_is_behind(paths, alone, replayed):
    """Of a prompt's passes, those that it does not have all of."""
    with workers(2, [paths["qwen2"]]) as found:
        addresses = [worker.address for worker in found]
        with shared_engine(paths["qwen2"], CUTS["halves"], addresses, n_ubatch=64) as opened:

            def die(i):
                if i == 5:
                    found[1].process.kill()

            assert_same(greedy(opened, LONG, 24, before_token=die), alone("qwen2", LONG, 24))
    assert replayed[:3] == [128, 192, 220]


def test_positions_that_were_computed_anew_are_those_of_the_snapshot(paths, alone, replayed):
    with workers(2, [paths["llama"]]) as found:
        addresses = [worker.address for worker in found]
        with shared_engine(paths["llama"], CUTS["ring"], addresses, n_ubatch=64) as opened:
            greedy(opened, PROMPT, 60)
            opened.truncate(0)
            greedy(opened, PROMPT[::-1], 40)
            opened.truncate(5)
            opened.forward(LONG[5:37])
            opened.truncate(0)

            def die(i):
                if i == 40:
                    found[1].process.kill()

            assert_same(greedy(opened, PROMPT, 60, before_token=die), alone("llama", PROMPT, 60))
    assert min(replayed) >= 18 + 40 - 2 * BLOCK


def test_an_interrupt_while_keys_and_values_are_given(paths, alone, replayed, monkeypatch):
    """Positions that have none are not taken for good."""
    with workers(2, [paths["qwen2"]]) as found:
        addresses = [worker.address for worker in found]
        with shared_engine(paths["qwen2"], CUTS["halves"], addresses, n_ubatch=64) as opened:

            def die(i):
                if i == 40:
                    found[0].process.kill()
                    with monkeypatch.context() as patched, pytest.raises(Cancelled):
                        patched.setattr(Snapshot, "get", interrupted)
                        opened.forward([1])
                    opened.truncate(30)
                    for token in expected[1][12:40]:
                        opened.forward([token])

            def interrupted(_snapshot, _layer, _first):
                raise Cancelled(2)

            expected = alone("qwen2", PROMPT, 50)
            assert_same(greedy(opened, PROMPT, 50, before_token=die), expected)
    assert replayed[0] == 0


def test_where_there_is_no_snapshot_all_is_computed_again(paths, alone, replayed, monkeypatch):
    """Recurrent states, for example, are not of one position."""
    wait_ready = Link.wait_ready

    def without(link, check):
        ready = wait_ready(link, check)
        link.cell_bytes = {}
        return ready

    monkeypatch.setattr(Link, "wait_ready", without)
    with workers(2, [paths["gemma3"]]) as found:
        addresses = [worker.address for worker in found]
        with shared_engine(paths["gemma3"], CUTS["halves"], addresses, n_ubatch=64) as opened:

            def die(i):
                if i == 20:
                    found[1].process.kill()

            assert_same(greedy(opened, PROMPT, 24, before_token=die), alone("gemma3", PROMPT, 24))
    assert replayed[:3] == [0, 18, 19]


def test_a_spare_one_takes_over_with_the_same_hidden_states_in_16_bits(paths):
    """They are what was sent: rounded already."""
    with workers(3, [paths["qwen2"]]) as found:
        addresses, answers = [worker.address for worker in found], []
        for dies in (False, True):
            owners = CUTS["ring"]
            with shared_engine(
                paths["qwen2"], owners, addresses[:2], spares=addresses[2:], hidden="f16", n_ubatch=64
            ) as opened:

                def die(i, dies=dies):
                    if dies and i == 12:
                        found[1].process.kill()

                answers.append(greedy(opened, LONG, 24, before_token=die))
                assert sum(link.replacements for link in opened.cluster.links) == dies
        assert_same(*answers)


def test_a_worker_that_comes_back_can_take_over(paths, alone):
    with workers(2, [paths["llama"]]) as found:
        addresses = [worker.address for worker in found]
        with shared_engine(paths["llama"], CUTS["halves"], addresses, n_ubatch=64) as opened:
            opened.forward(PROMPT)
            found[1].process.kill()
            opened.forward([1])
            assert [link.address for link in opened.cluster.links] == addresses[:1]
            found[1].process.communicate()
            found[1] = WorkerProcess([paths["llama"]], listen=addresses[1])
            assert found[1].address == addresses[1]
            opened.truncate(0)
            opened.forward(PROMPT[:5])
            deadline = time.monotonic() + 5
            while not opened.cluster._spares and time.monotonic() < deadline:
                time.sleep(0.01)
            found[0].process.kill()
            opened.truncate(0)
            assert_same(greedy(opened, PROMPT, 6), alone("llama", PROMPT, 6))
            assert [link.address for link in opened.cluster.links] == addresses[1:]


@pytest.mark.parametrize("comes", [True, False])
def test_a_worker_that_somebody_starts_again_elsewhere(comes, paths, alone):
    """Where it does not come, the others take over."""
    notes = []
    with workers(3, [paths["llama"]]) as found:
        addresses = [worker.address for worker in found]
        with shared_engine(paths["llama"], CUTS["halves"], addresses[:2], n_ubatch=64) as opened:

            def restarted(link):
                assert link.address == addresses[1]
                if not comes:
                    raise WorkerError("nobody starts it again")
                return link.again(addresses[2])

            opened.cluster.restarted, opened.cluster.note = restarted, notes.append

            def die(i):
                if i == 2:
                    found[1].process.kill()

            assert_same(greedy(opened, PROMPT, 6, before_token=die), alone("llama", PROMPT, 6))
            expected = [addresses[0], addresses[2]] if comes else addresses[:1]
            assert [link.address for link in opened.cluster.links] == expected
            assert len(opened.cluster._lost) == (not comes)
    assert ("nobody starts it again" in notes) == (not comes)


def test_workers_die_one_after_the_other_at_any_moment(paths, alone):
    expected = alone("gemma3", PROMPT, 40)
    with workers(4, [paths["gemma3"]]) as found:
        addresses = [worker.address for worker in found]
        with shared_engine(paths["gemma3"], CUTS["ring"], addresses[:2], spares=addresses[2:], n_ubatch=64) as opened:
            timers = [threading.Timer(0.05 * (i + 1), found[i].process.kill) for i in range(3)]

            def begin(i):
                time.sleep(0.01)
                if i == 0:
                    for timer in timers:
                        timer.start()

            assert_same(greedy(opened, PROMPT, 40, before_token=begin), expected)


def test_a_worker_ends_at_once_and_says_nothing_wrong(paths):
    worker = WorkerProcess([paths["llama"]])
    with shared_engine(paths["llama"], [0, 0, 0, 0], [worker.address], n_ubatch=64) as opened:
        opened.forward(PROMPT)
        start = time.monotonic()
        assert worker.close() == 0
        assert time.monotonic() - start < 2
    assert worker.log == "layers 0-3: 4.8 MB in memory\n"


def bytes_read(process):
    """By a process until now, from files of any kind."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
    return int(fields["rchar"])


def test_weights_stay_for_the_next_root_also_with_another_context(paths):
    worker = WorkerProcess([paths["llama"]])
    address, read = worker.address, []
    for n_ctx, prompt in ((512, PROMPT), (512, PROMPT * 4), (256, PROMPT)):
        before = bytes_read(worker.process)
        with shared_engine(paths["llama"], [0] * 4, [address], n_ubatch=len(prompt), n_ctx=n_ctx) as opened:
            opened.forward(prompt)
            opened.forward([1])
        read.append(bytes_read(worker.process) - before)
    assert worker.close() == 0
    assert worker.log.count("layers 0-3") == 2
    kernels = 2 * code_pages._KERNELS.stat().st_size  # read for each engine, to stay in the page cache
    assert read[0] > 4 * MB
    assert read[1] < MB
    assert read[2] < MB + kernels


@pytest.fixture
def short_pings(monkeypatch):
    """A second each."""
    pings = [(name, 1000 if name.endswith("_ms") else value) for name, value in wire._PINGS]
    monkeypatch.setattr(wire, "_PINGS", pings)


def test_a_worker_that_hangs_is_noticed(paths, short_pings):
    with (
        workers(1, [paths["llama"]]) as (worker,),
        shared_engine(paths["llama"], [0] * 4, [worker.address], n_ubatch=64) as opened,
    ):
        opened.forward(PROMPT)
        worker.process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(WorkerError, match="does not answer any more"):
            opened.forward([1])
        assert time.monotonic() - start < 4


def test_workers_that_hang_are_left_all_at_once(paths, monkeypatch):
    monkeypatch.setattr(wire, "_LAST_S", 1.0)
    with workers(3, [paths["llama"]]) as found:
        mine = Hello(PROTOCOL, build(), ModelFile.open(paths["llama"]).hash, cpu_class())
        links = greet([worker.address for worker in found], lambda _: None, mine)
        for worker in found:
            worker.process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        close_all(links)
        assert 0.9 < time.monotonic() - start < 2.5


def test_another_worker_takes_over_from_one_that_hangs(paths, alone, short_pings):
    notes = []
    with workers(3, [paths["llama"]]) as found:
        addresses = [worker.address for worker in found]
        owners = CUTS["ring"]
        with shared_engine(paths["llama"], owners, addresses[:2], spares=addresses[2:], n_ubatch=64) as opened:
            opened.cluster.note = notes.append

            def stop(i):
                if i == 3:
                    found[1].process.send_signal(signal.SIGSTOP)

            assert_same(greedy(opened, PROMPT, 8, before_token=stop), alone("llama", PROMPT, 8))
    assert [note.split("; ")[0] for note in notes] == [
        f"the worker {addresses[1]} is gone: it does not answer any more"
    ]
