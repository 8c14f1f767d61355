"""Measure one model on this machine: memory, disk, computing, release, put together as a profile.

Everything is measured with nothing but a window of one layer in memory (k = 0, w = 1), so a model larger than memory
can be measured inside any budget that can run it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import msgspec

from profiler import disk
from profiler.batches import N_TEXTS, measure_batch, settings_of, untouched_bytes
from profiler.compute import ComputeTimes, measure_compute
from profiler.device import device_info, usable_cores
from profiler.model_profile import (
    SCHEMA,
    BatchProfile,
    DiskProfile,
    EmbeddingProfile,
    HeadProfile,
    KvLayer,
    KvProfile,
    LayerProfile,
    MemoryProfile,
    ModelInfo,
    ModelProfile,
    Spread,
)
from profiler.release import resident_release, slot_release
from profiler.timing import columns
from runtime.answer.drafters import can_take_back
from runtime.engine.engine import Engine
from runtime.errors import BudgetError, Cancelled, ModelError
from runtime.kv.cache import K, V, find_cache
from runtime.llama import abi
from runtime.llama.context import Context
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import Layer, ModelFile
from runtime.memory import available_bytes, drop_file_pages, file_bytes, resident_bytes
from runtime.plans.ledger import Ledger, floor_for
from runtime.plans.plan import Plan
from runtime.plans.residency import layer_bytes, smallest_window, streamable_bytes
from runtime.settings import SHORT_PASS, Settings
from runtime.sizes import MB, format_size
from runtime.weights.files import WeightFiles

CTX_TOKENS = 512
_ROOT = Path(__file__).resolve().parent.parent
_N_ROWS = 16
_UNSTEADY = 0.2
_DISTURBED = 1.1  # a time through the model that is longer than this times the fastest one was disturbed
_GUESSED_BYTES_PER_S = 1e9
_SEARCH_S = 10.0  # what a search for the best way to read takes, about
_PACKAGES = {"h2o": "h2o-llm", "llama_cpp_python": "llama-cpp-python"}


@dataclass(frozen=True)
class Needs:
    """Memory by part of an engine that is open but has no weights, at the context and batch of `memory`.

    need_bytes: of all parts, with the smallest window.
    """

    memory: MemoryProfile
    kv_bytes_per_token: int
    kv: KvProfile | None
    need_bytes: int


@dataclass(frozen=True)
class RunMemory:
    """Bytes of a process that has loaded the code of a run and no model yet, what a KV filter's code adds, and how many
    of process_bytes are pages of files."""

    process_bytes: int
    filter_bytes: int
    from_files: int = 0

    @property
    def surplus_bytes(self) -> int:
        """What this process, no model loaded, takes more than a run."""
        return resident_bytes() - self.process_bytes


@dataclass(frozen=True)
class DiskTimes:
    """The disk's part of a profile, and seconds to read each layer, then the head."""

    profile: DiskProfile
    group_s: list[Spread]
    row_s: Spread


class Measurement:
    """One run of all measurements. `share` says how much is done, `notes` what the user should know afterwards."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        repeats: int = 3,
        progress: Callable[[float], None] = lambda _share: None,
        *,
        n_threads: int | None = None,
        budget_bytes: int = 0,
        run_memory: RunMemory | None = None,
    ) -> None:
        """run_memory: what a run takes without a model; None: as much as this process."""
        self.path, self.repeats = Path(path), max(1, repeats)
        self.share = 0.0
        self.notes: list[str] = []
        self.resident_release_s: Spread | None = None  # of one layer, where there was memory to measure it
        self.need_bytes = 0  # of a run in the smallest budget, measured
        self.settings = Settings()  # of that run
        self._progress = progress
        self._n_threads = n_threads or usable_cores()
        self._budget_bytes = budget_bytes
        self._run_memory = run_memory or RunMemory(resident_bytes(), 0)
        self._cancelled = 0
        self._engine: Engine | None = None
        self._done_s, self._total_s = 0.0, 1.0

    def cancel(self, signal_number: int) -> None:
        """End the work soon (from a signal handler); run() then raises Cancelled."""
        self._cancelled = signal_number
        if self._engine:
            self._engine.cancel(signal_number)

    def run(self) -> ModelProfile:
        """Measure everything."""
        self._surplus_bytes = self._run_memory.surplus_bytes
        file = ModelFile.open(self.path)
        hollow = HollowModel(file)
        try:
            self._expect(file, _GUESSED_BYTES_PER_S)
            needs, window_bytes = self._memory(file, hollow)
            disk_times = self._disk(file, window_bytes + needs.memory.compute_bytes)  # no engine is open meanwhile
            compute = self._compute(file, hollow, disk_times.profile, window_bytes)
            batches = self._batches(file, hollow, disk_times.profile, window_bytes)
            unused_bytes = self._unused_bytes(file, hollow)
            release = [slot_release(group, self.repeats) for group in file.groups]
            self._resident_release(file)
        finally:
            hollow.free()
        self._total_s = self._done_s
        self._advance(self._done_s)
        needs = replace(needs, memory=msgspec.structs.replace(needs.memory, unused_bytes=unused_bytes))
        return msgspec.structs.replace(_profile(file, needs, disk_times, compute, release), batches=batches)

    # --- the parts ----------------------------------------------------------------------------------------------

    def _memory(self, file: ModelFile, hollow: HollowModel) -> tuple[Needs, int]:
        """What the process needs besides weights, and the bytes of the window to measure with."""
        self.settings = default_settings(file, self._n_threads)
        needs = measure_memory(file, hollow, self.settings, self._surplus_bytes)
        self.need_bytes = needs.need_bytes
        needs = replace(
            needs, memory=msgspec.structs.replace(needs.memory, filter_process_bytes=self._run_memory.filter_bytes)
        )
        self._check()
        floor_bytes = floor_for(needs.need_bytes + max(0, self._surplus_bytes))
        budget = min(available_bytes(), self._budget_bytes or available_bytes())
        if budget < floor_bytes:
            raise BudgetError(
                f"{format_size(budget)} is too small to measure this model",
                f"give at least -m {floor_bytes // MB}: measuring takes a few MB more than a run",
                floor_bytes=floor_bytes,
            )
        least = smallest_window(file)
        window_bytes = max(least, min(_largest_layer(file), budget - floor_bytes + least))
        return needs, window_bytes

    def _disk(self, file: ModelFile, free_bytes: int) -> DiskTimes:
        begin_s = self._done_s
        found = disk.search(
            file,
            n_threads=self._n_threads,
            buffer_bytes=min(disk.BUFFER_BYTES, free_bytes),
            progress=lambda share: self._advance(begin_s + share * _SEARCH_S),
        )
        self.notes += found.notes
        self._expect(file, found.bytes_per_s)
        files = WeightFiles(file.paths)
        try:
            rows = self._streams(file, files, found.best)
            row_s = Spread.of(disk.row_seconds(file, files, _N_ROWS))
        finally:
            files.close()
        rate = Spread.of([streamable_bytes(file) / sum(row) for row in rows])
        if rate.sd > _UNSTEADY * rate.mean:
            self.notes.append(f"the disk's speed varied by {rate.sd / rate.mean:.0%}: was it busy with something else?")
        profile = DiskProfile(rate, found.mode, *found.best, found.points)
        return DiskTimes(profile, columns(rows), row_s)

    def _streams(self, file: ModelFile, files: WeightFiles, way: disk.Way) -> list[list[float]]:
        """The model read `repeats` times, the fastest first; disturbed times are made again, up to `repeats` more."""
        rows: list[list[float]] = []
        while len(rows) < self.repeats or (len(rows) < 2 * self.repeats and _disturbed(rows[: self.repeats])):
            rows.append(self._stream(file, files, way))
            rows.sort(key=sum)
        return rows[: self.repeats]

    def _stream(self, file: ModelFile, files: WeightFiles, way: disk.Way) -> list[float]:
        seconds = disk.group_seconds(file, files, way, lambda: not self._cancelled)
        self._advance(self._done_s + self._stream_s)
        return seconds

    def _compute(self, file: ModelFile, hollow: HollowModel, found: DiskProfile, window_bytes: int) -> ComputeTimes:
        settings = replace(self.settings, request_bytes=found.request_bytes, depth=max(1, found.depth))
        engine = Engine(file, hollow, Plan(0, 1, window_bytes=window_bytes), settings)
        self._engine = engine
        try:
            self._check()
            left = self._left_bytes(engine, window_bytes)
            room_bytes = left if self._budget_bytes else min(left, available_bytes() // 2)
            times = measure_compute(engine, hollow, self.repeats, self._passed, room_bytes=room_bytes)
        finally:
            self._engine = None
            engine.close()
        if not times.steady:
            self.notes.append("other programs kept the processors busy: compute times are too long")
        return times

    def _batches(
        self, file: ModelFile, hollow: HollowModel, found: DiskProfile, window_bytes: int
    ) -> tuple[BatchProfile, ...]:
        """Passes of several texts, as far as the budget has room for them; where it has none for all positions, texts
        share them."""
        if not can_take_back(hollow):
            return ()
        settings = replace(self.settings, request_bytes=found.request_bytes, depth=max(1, found.depth))
        batches: list[BatchProfile] = []
        for n_texts in N_TEXTS:
            engine = Engine(file, hollow, Plan(0, 1, window_bytes=window_bytes), settings_of(settings, n_texts))
            self._engine = engine
            try:
                self._check()
                spare = self._left_bytes(engine, window_bytes)
                room = 0 if self._budget_bytes else min(spare, available_bytes() // 2)
                if spare + untouched_bytes(engine, self.repeats) >= 0:
                    memory = {"room_bytes": room, "spare_bytes": spare}
                    batches.append(measure_batch(engine, self.repeats, self._passed, **memory))
            finally:
                self._engine = None
                engine.close()
        return tuple(batches)

    def _left_bytes(self, engine: Engine, window_bytes: int) -> int:
        """Memory that an engine, which streams everything, leaves."""
        most = available_bytes()
        return min(most, self._budget_bytes or most) - engine.layout.fixed_bytes - window_bytes

    def _unused_bytes(self, file: ModelFile, hollow: HollowModel) -> int:
        """Bytes of a run's process that are pages of files and that tokens do not use."""
        engine = Engine(file, hollow, Plan(0, 1, window_bytes=smallest_window(file)), self.settings)
        self._engine = engine
        try:
            engine.forward([0])
            drop_file_pages()
            engine.forward([1])
            return max(0, self._run_memory.from_files - file_bytes())
        finally:
            self._engine = None
            engine.close()

    def _resident_release(self, file: ModelFile) -> None:
        """Measured only where the memory for a whole layer is there."""
        layer = max(file.layers, key=layer_bytes)
        if layer_bytes(layer) < available_bytes() // 4 and not self._budget_bytes:
            self.resident_release_s = resident_release(layer, self.repeats)

    # --- progress and the end -----------------------------------------------------------------------------------

    def _expect(self, file: ModelFile, bytes_per_s: float) -> None:
        """Estimate all work in seconds, now that the disk's rate is known."""
        self._stream_s = streamable_bytes(file) / bytes_per_s
        self._pass_s = self._stream_s + streamable_bytes(file) / 2e9
        self._total_s = (
            _SEARCH_S + self.repeats * self._stream_s + 2 * (1 + len(N_TEXTS)) * (self.repeats + 1) * self._pass_s
        )

    def _passed(self) -> None:
        self._advance(self._done_s + self._pass_s)

    def _advance(self, done_s: float) -> None:
        self._done_s = done_s
        self.share = min(1.0 if done_s == self._total_s else 0.99, done_s / self._total_s)
        self._progress(self.share)
        self._check()

    def _check(self) -> None:
        if self._cancelled:
            raise Cancelled(self._cancelled)


def _disturbed(rows: list[list[float]]) -> bool:
    """Whether times through the model, the fastest first, differ by more than an idle disk's do."""
    return sum(rows[-1]) > _DISTURBED * sum(rows[0])


def default_settings(file: ModelFile, n_threads: int = 1) -> Settings:
    """The context and batch a profile's memory figures are for."""
    n_ctx = min(CTX_TOKENS, file.hyper_parameter("context_length") or CTX_TOKENS)
    return Settings(n_ctx=n_ctx, n_threads=n_threads)


def measure_memory(file: ModelFile, hollow: HollowModel, settings: Settings, surplus_bytes: int = 0) -> Needs:
    """Open engines without reading more than a window, at two context sizes: what grows with the context is KV.

    surplus_bytes: what this process takes more than a run, whose memory is wanted.
    """
    plan = Plan(0, 1, window_bytes=smallest_window(file))
    small, prompt_bytes = _ledger(file, hollow, plan, settings)
    large, large_prompt_bytes = _ledger(file, hollow, plan, replace(settings, n_ctx=2 * settings.n_ctx))
    short, _ = _ledger(file, hollow, plan, replace(settings, n_ubatch=SHORT_PASS))
    per_token = max(0, -(-(large.kv_bytes - small.kv_bytes) // settings.n_ctx))
    kv_bytes = min(small.kv_bytes, per_token * settings.n_ctx)
    in_layers = sum(_small_bytes(layer) for layer in file.layers)
    others = short.embedding_bytes + small.sampler_bytes + small.cache_bytes + small.kv_bytes - kv_bytes
    rows_bytes = small.embedding_bytes - short.embedding_bytes  # of the input embedding, for a prompt
    memory = MemoryProfile(
        process_bytes=max(0, small.process_bytes - surplus_bytes - in_layers) + others,
        ctx_tokens=settings.n_ctx,
        ubatch_tokens=settings.n_ubatch,
        kv_bytes=kv_bytes,
        compute_bytes=small.compute_bytes + rows_bytes,
        min_window_bytes=smallest_window(file),
        margin_bytes=small.margin_bytes,
        prompt_bytes=prompt_bytes + rows_bytes,
        compute_bytes_per_token=max(0, large.compute_bytes - small.compute_bytes) // settings.n_ctx,
        prompt_bytes_per_token=max(0, large_prompt_bytes - prompt_bytes) // settings.n_ctx,
    )
    floor = small.fixed_bytes - surplus_bytes + smallest_window(file)
    return Needs(memory, per_token, measure_kv(file, hollow, settings), floor)


def measure_kv(file: ModelFile, hollow: HollowModel, settings: Settings) -> KvProfile | None:
    """The cache of keys and values, layer by layer; None where nothing of it can be filtered."""
    context = Context(hollow, settings, settings.n_ubatch)
    try:
        cache = find_cache(context.buffers.caches, file, hollow.pointer)
    except ModelError:
        return None
    finally:
        context.close()
    layers = tuple(
        KvLayer(n, layer.parts[K].row_bytes, layer.parts[V].row_bytes, n in cache.filterable)
        for n, layer in sorted(cache.layers.items())
    )
    return KvProfile(int(abi.llama.llama_model_n_head(hollow.pointer)), layers)


def _ledger(file: ModelFile, hollow: HollowModel, plan: Plan, settings: Settings) -> tuple[Ledger, int]:
    """An engine's ledger while it computes a prompt, and the bytes of it that only a prompt needs."""
    engine = Engine(file, hollow, plan, settings)
    engine.close()
    return engine.ledger, engine.layout.prompt_bytes


def _largest_layer(file: ModelFile) -> int:
    return max(layer_bytes(layer) for layer in file.layers)


def _small_bytes(layer: Layer) -> int:
    """Bytes of the layer's tensors that always stay in memory."""
    return sum(info.n_bytes for info in layer.small)


# --- the profile ----------------------------------------------------------------------------------------------------


def _profile(
    file: ModelFile, needs: Needs, disk_times: DiskTimes, compute: ComputeTimes, release: list[Spread]
) -> ModelProfile:
    times = list(zip(disk_times.group_s, compute.decode, compute.prefill, release, strict=True))
    layers = tuple(
        LayerProfile(layer_bytes(layer), _small_bytes(layer), *of_layer)
        for layer, of_layer in zip(file.layers, times[:-1], strict=True)
    )
    tile_bytes = max(piece.span_bytes for piece in file.head.pieces)
    tables = file.row_tables
    return ModelProfile(
        schema=SCHEMA,
        model=model_info(file),
        device=device_info(file.path),
        versions=_versions(),
        disk=disk_times.profile,
        layers=layers,
        head=HeadProfile(layer_bytes(file.head), tile_bytes, *times[-1]),
        embedding=EmbeddingProfile(
            sum(table.n_bytes for table in tables), tables[0].row_bytes if tables else 0, disk_times.row_s
        ),
        prefill_tokens=compute.prefill_tokens,
        overhead_s=compute.overhead_s,
        kv_bytes_per_token=needs.kv_bytes_per_token,
        kv=needs.kv,
        memory=needs.memory,
        floor_bytes=floor_for(needs.need_bytes),
    )


def model_info(file: ModelFile) -> ModelInfo:
    """Which model it is; the path is relative for a model inside the checkout."""
    path = file.path.resolve()
    shown = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path
    return ModelInfo(str(shown), file.name, file.hash, file.architecture, file.n_bytes, file.n_layers, file.tied_head)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for key, package in _PACKAGES.items():
        try:
            found[key] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[key] = "not installed"
    return found
