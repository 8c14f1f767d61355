"""`h2o plan`: choose what stays in memory and what is streamed, and tell running processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from h2o_cli import device_flags
from h2o_cli import kv_flags as flag
from h2o_cli.cmd_devices import show as show_devices
from h2o_cli.output import emit, note, print_json
from h2o_cli.plan_report import Outlook, as_json, explain_choice, outlook_of, report
from h2o_cli.plan_source import SourceSearch, check_layers, plan_as_source, set_by_hand, write, written_text
from h2o_cli.session.defaults import CONVERSATION_CONTEXT, LEAST_UBATCH, N_PREDICT, default_threads
from h2o_cli.session.kv_filter import KvChoice, KvFlags, choose_filter, read_kv_config
from h2o_cli.session.models import DEFAULT_MODEL, ROOT, find_profile, need_profile, resolve_model
from h2o_cli.session.team import Flags
from runtime.errors import BudgetError, DiskError, EngineError, ModelError, PlanError, ProfileError, UsageError
from runtime.plans.budget import Budget
from runtime.plans.file import default_plan_path, read_plan
from runtime.plans.ledger import below_floor
from runtime.plans.plan import Layout, Plan
from runtime.settings import KV_TYPES
from runtime.sizes import format_size

if TYPE_CHECKING:
    from planner.choose import Choice
    from planner.kv import KvUse
    from profiler.model_profile import ModelProfile

EPILOG = """Examples:

\b
  h2o plan -m 400                 plan for 400 MB; running processes of this model take it over
  h2o plan -m 2GB --explain       with the plans that were compared
  h2o plan --set 10,2             exactly 10 layers resident, a window of 2 layers
  h2o plan --show                 the plan in force
  h2o plan --live                 try plans on the process that is running, keep the fastest
  h2o plan -c profile.json -m 1GB --json
  h2o plan -m 400 --ctx 16384 --kv-filter --kv-store disk    for a run with the same flags
  h2o plan model.gguf --workers local,192.168.1.7:9999 --tls cluster/me      placement over devices
  h2o plan -m 419 --batch         how many texts `h2o batch` should answer at once
  h2o plan --batch --source -m 200GB model.gguf     the policy that FlexGen's cost model finds, for its machine
  h2o plan --source -c four-keys.json -m 400 -s kw.bin --compat    as the source system plans, in its file
"""


@dataclass(frozen=True)
class PlanOptions:
    """What the flags of `h2o plan` say. n_predict: most tokens of an answer (negative: no limit)."""

    budget: Budget
    plan_file: Path
    layout: Layout | None
    ctx: int | None
    by_hand: tuple[int, int] | None
    kv_type: str = "f16"
    kv: KvChoice | None = None
    kv_flags: KvFlags = field(default_factory=KvFlags)
    compat: bool = False
    n_predict: int = N_PREDICT

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> PlanOptions:
        """From the flags as given. Raises UsageError."""
        flags, layout, by_hand = KvFlags.of(given), given["layout"], given["by_hand"]
        return cls(
            budget=Budget.parse(given["memory"]),
            plan_file=given["plan_file"] or default_plan_path(),
            layout=None if layout == "auto" else Layout.parse(layout),
            ctx=given["ctx"],
            by_hand=_parse_set(by_hand) if by_hand else None,
            kv_type=given["kv_type"],
            kv=choose_filter(flags, read_kv_config(given["kv_config"])),
            kv_flags=flags,
            n_predict=given["predict"],
            compat=given["compat"],
        )


Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", show_default=False, help=f"A profiled model. {DEFAULT_MODEL}")
]
Memory = Annotated[
    str | None,
    typer.Option("-m", "--memory", metavar="SIZE", help="Memory of a process: 400 (MB), 1.5GB. [default: 60 %]"),
]
Profile = Annotated[
    Path | None,
    typer.Option(
        "-c", "--profile", metavar="PROFILE", help="A profile from `h2o profile`, or the source system's four keys."
    ),
]
PlanFile = Annotated[Path | None, typer.Option("-s", "--plan-file", metavar="PLANFILE", help="Write the plan there.")]
ByHand = Annotated[str | None, typer.Option("--set", metavar="K,W", help="K layers resident, a window of W layers.")]
Compat = Annotated[
    bool, typer.Option("--compat", help="Write the source system's file of 8 bytes (k and w only); needs -s.")
]
Source = Annotated[
    bool, typer.Option("--source", help="Plan as the source system does; -m counts layers only. With --batch: its CPU.")
]
Explore = Annotated[float, typer.Option("--c", metavar="C", help="With --source: weight of exploring.")]
Episodes = Annotated[int, typer.Option("--episodes", metavar="N", help="With --source: plays in all.")]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="S", help="With --source: order of first plays. [default: k, then w]")
]
Show = Annotated[bool, typer.Option("--show", help="Show the plan in the plan file, write nothing.")]
Explain = Annotated[bool, typer.Option("--explain", help="Show the plans that were compared.")]
Batch = Annotated[bool, typer.Option("--batch", help="Predict batch sizes for `h2o batch`, write nothing.")]
Live = Annotated[bool, typer.Option("--live", help="Try plans on the running process, keep the fastest.")]
LayoutName = Annotated[
    str,
    typer.Option("--layout", metavar="auto|prefix|even|balanced", help="What stays in memory (even: whole layers)."),
]
Ctx = Annotated[int | None, typer.Option("--ctx", metavar="N", help="Context in tokens.")]
Predict = Annotated[
    int, typer.Option("-n", "--predict", metavar="N", help="Most tokens of an answer; matters with --kv-filter.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
KvType = Annotated[
    str,
    typer.Option(
        "--kv-type",
        metavar="|".join(KV_TYPES),
        help="Precision of keys and values; f32: twice the memory of f16, q8_0: half of it, q4_0: a quarter.",
    ),
]


def plan(  # noqa: PLR0913, PLR0917 - one parameter per flag
    model: Model = None,
    memory: Memory = None,
    profile: Profile = None,
    plan_file: PlanFile = None,
    by_hand: ByHand = None,
    show: Show = False,
    explain: Explain = False,
    live: Live = False,
    batch: Batch = False,
    layout: LayoutName = "auto",
    ctx: Ctx = None,
    predict: Predict = N_PREDICT,
    json: Json = False,
    compat: Compat = False,
    source: Source = False,
    c: Explore = 1.0,
    episodes: Episodes = 500,
    seed: Seed = None,
    kv_type: KvType = "f16",
    kv_filter: flag.Switch = False,
    kv_layers: flag.Layers = None,
    kv_wait: flag.Wait = None,
    kv_keep: flag.Keep = None,
    kv_select: flag.Select = None,
    kv_store: flag.Store = None,
    kv_sinks: flag.Sinks = None,
    kv_recent: flag.Recent = None,
    kv_block: flag.Block = None,
    kv_strategy: flag.Strategy = None,
    kv_method: flag.Method = None,
    kv_config: flag.Config = None,
    workers: device_flags.Workers = None,
    device_file: device_flags.File = None,
    priority: device_flags.Priority = None,
    prioritize_by_memory: device_flags.ByMemory = False,
    tls: device_flags.Tls = None,
    refresh: device_flags.Refresh = False,
    hidden: device_flags.Hidden = "f32",
) -> None:
    """Choose what stays in memory and what is streamed, for a budget.

    The plan goes into the plan file; `h2o run` takes it over, also while it is running. With workers the layers are
    placed over devices, and nothing is written.
    """
    given = locals()
    devices = Flags.of(given)
    devices.check()
    if devices.are_given:
        show_devices(model, devices, memory, None, json)
        return
    _check_flags(given)
    options = PlanOptions.of(given)
    if source:
        _plan_as_source(options, given)
    elif show:
        _show(options, profile, model, json=json)
    else:
        _choose(options, given)


def _plan_as_source(options: PlanOptions, given: Mapping[str, Any]) -> None:
    """What the source systems would do: FlexGen's batches, or the layers of the first one."""
    if given["batch"]:
        from h2o_cli.plan_batches import show_as_source

        show_as_source(resolve_model(given["model"]), options.budget.n_bytes, options.ctx, json=given["json"])
        return
    settings = given["memory"] or "", given["c"], given["episodes"], given["seed"]
    search = SourceSearch(given["profile"], given["model"], *settings)
    plan_as_source(search, options.plan_file, compat=options.compat, json=given["json"])


def _choose(options: PlanOptions, given: Mapping[str, Any]) -> None:
    """Predict batches, search on the running process, or make a plan: what needs the profile of the model."""
    profile, model, json = given["profile"], given["model"], given["json"]
    if given["batch"]:
        _batches(options, _load(profile, model), json=json)
    elif given["live"]:
        _live(options, _load(profile, model), explain=given["explain"], json=json)
    elif options.by_hand and profile is None and not _has_profile(model, compat=options.compat):
        set_by_hand(options.by_hand, options.layout, options.plan_file, model, compat=options.compat, json=json)
    else:
        _make(options, _load(profile, model), explain=given["explain"], json=json)


def _check_flags(given: Mapping[str, Any]) -> None:
    """Raise UsageError for flags that do not go together, and for numbers that are not possible."""
    show, live, by_hand = given["show"], given["live"], given["by_hand"]
    if show and (by_hand or given["memory"]):
        raise UsageError("--show writes no plan", "leave out -m and --set, or --show")
    if live and (show or by_hand):
        raise UsageError("--live finds the plan by itself", "leave out --set and --show, or --live")
    if given["explain"] and (show or by_hand):
        raise UsageError("--explain shows what the planner compared", "leave out --show and --set, or --explain")
    if given["source"] and (show or live or by_hand or given["explain"] or not given["memory"]):
        raise UsageError("--source finds a plan for -m", "give -m, leave out --show, --live, --explain and --set")
    if given["compat"] and (show or live or not given["plan_file"]):
        raise UsageError("--compat writes a file of 8 bytes", "name it with -s, leave out --show and --live")
    if given["compat"] and given["layout"] not in ("auto", Layout.PREFIX.label):
        raise UsageError("a file of 8 bytes knows no layout but prefix", "leave out --layout or --compat")
    _check_batch(given)
    if given["kv_type"] not in KV_TYPES:
        raise UsageError(f"--kv-type {given['kv_type']} is not possible", f"choose one of {', '.join(KV_TYPES)}")
    if given["predict"] < -1:
        raise UsageError(f"-n {given['predict']} is not possible", "give 0 or more, or -1 for no limit")
    if given["ctx"] is not None and given["ctx"] < 1:
        raise UsageError(f"--ctx {given['ctx']} is not possible", "give 1 or more")


def _check_batch(given: Mapping[str, Any]) -> None:
    """Raise UsageError for flags that do not go with --batch."""
    if given["batch"] and given["source"] and (given["profile"] or given["compat"] or given["plan_file"]):
        raise UsageError("--batch --source needs no profile and writes no file", "leave out -c, -s and --compat")
    if given["batch"] and any(given[name] for name in ("show", "live", "by_hand", "explain", "kv_filter")):
        raise UsageError(
            "--batch predicts batch sizes and chooses no plan", "leave out the other ways, and --kv-filter"
        )


def _has_profile(model: str | None, *, compat: bool) -> bool:
    """Whether there is a profile of the model; what is written for any model (--compat, none named) needs none."""
    if compat and model is None:
        return False
    from runtime.llama.model_file import ModelFile

    return find_profile(ModelFile.open(resolve_model(model)).hash) is not None


def _make(options: PlanOptions, profile: ModelProfile, *, explain: bool, json: bool) -> None:
    """Decide, write the plan file, and say so."""
    outlook, choice = _decide(profile, options)
    written = write(options.plan_file, outlook.plan, compat=options.compat)
    outlook = replace(outlook, plan=written)
    if json:
        print_json(as_json(outlook, profile, options.plan_file))
        return
    emit(report(outlook, profile) + "\n")
    if explain and choice:
        emit("\n" + explain_choice(choice) + "\n")
    note(written_text(written, options.plan_file))


def _live(options: PlanOptions, profile: ModelProfile, *, explain: bool, json: bool) -> None:
    from h2o_cli.plan_live import plan_live

    if options.kv or options.kv_type != PlanOptions.kv_type or options.ctx:
        raise UsageError("--live takes the running process as it is", "leave out --ctx, --kv-type and --kv-filter")
    plan_live(profile, options.plan_file, options.budget.cap_bytes, options.layout, show_arms=explain, json=json)


def _batches(options: PlanOptions, profile: ModelProfile, *, json: bool) -> None:
    """Predict how fast `h2o batch` is with each batch size; --ctx is for each text."""
    from h2o_cli.plan_batches import show
    from planner.kv import KvUse

    if not profile.knows_memory:
        raise ProfileError("this profile has no memory figures", "measure the model with `h2o profile`")
    show(profile, options.budget.n_bytes, options.ctx, KvUse(options.kv_type), json=json)


def _parse_set(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise UsageError(f"--set {text} is not possible", "give two numbers: --set K,W, such as 10,2")
    return int(parts[0]), int(parts[1])


def _load(path: Path | None, model: str | None) -> ModelProfile:
    """The profile named, or the one of the model. Raises ProfileError."""
    from planner.source.profile import load_foreign
    from profiler.model_profile import load_profile

    if path is None:
        from runtime.llama.model_file import ModelFile

        file = ModelFile.open(resolve_model(model))
        return load_profile(need_profile(file.hash, str(file.path))).checked(file.paths)
    return load_foreign(path)


def _context(options: PlanOptions, profile: ModelProfile) -> int:
    return options.ctx or profile.memory.ctx_tokens or CONVERSATION_CONTEXT


def _kv_use(options: PlanOptions, model_hash: int) -> KvUse:
    """How the run will keep keys and values. Raises UsageError."""
    from planner.kv import KvUse

    if options.kv is None:
        return KvUse(options.kv_type)
    wanted = options.kv.for_model(model_hash)
    return KvUse(options.kv_type, replace(wanted, tail=options.n_predict + 1 if options.n_predict >= 0 else 0))


def _floor(options: PlanOptions, profile: ModelProfile) -> int:
    """The smallest budget of a run with these options, in bytes; 0 where the profile's model is not at hand."""
    path = ROOT / profile.model.path
    if not profile.model.hash or not path.is_file():
        return 0
    from h2o_cli.floor_run import smallest_budget
    from h2o_cli.session.smallest import PROMPT
    from runtime.llama.model_file import ModelFile
    from runtime.settings import Settings

    try:
        file = ModelFile.open(path)
        if file.hash != profile.model.hash:
            return 0
        kv = _kv_use(options, file.hash)
        n_ctx, n_threads = _context(options, profile), default_threads()
        settings = Settings(n_ctx=n_ctx, n_threads=n_threads, kv_type=kv.kv_type, kv=kv.filter)
        flags = ["--kv-type", kv.kv_type, "-n", str(options.n_predict), *options.kv_flags.as_arguments()]
        return smallest_budget(file, PROMPT, settings, flags)
    except (ModelError, EngineError, DiskError):
        return 0


def _decide(profile: ModelProfile, options: PlanOptions) -> tuple[Outlook, Choice | None]:
    """The planner's choice, or the plan given by hand."""
    if options.by_hand:
        return _by_hand(profile, options), None
    budget = options.budget.n_bytes
    if not options.budget.is_given:
        budget = options.budget.following(_plan_in_force(options.plan_file, profile.model.hash))
    from planner.choose import choose

    ctx, kv = _context(options, profile), _kv_use(options, profile.model.hash)
    floor = _floor(options, profile)
    if budget < floor:
        raise below_floor(budget, floor, "a smaller --ctx")
    if not profile.knows_memory and budget < profile.memory.min_window_bytes:
        least = format_size(profile.memory.min_window_bytes)
        raise BudgetError(f"{format_size(budget)} does not hold one layer of {least}", "raise -m")
    layout = Layout.PREFIX if options.compat else options.layout
    choice = choose(
        profile, budget, ctx_tokens=ctx, ubatch_tokens=LEAST_UBATCH, layout=layout, kv=kv, floor_bytes=floor
    )
    outlook = Outlook(
        choice.plan,
        choice.predicted_ms_per_token,
        choice.full_ms_per_token,
        ctx,
        choice.predicted_ttft_s,
        choice.limit_ms_per_token,
        budget,
        choice.floor_bytes,
        choice.ledger,
        choice.what_helps,
        choice.method,
        kv,
    )
    return outlook.known(profile), choice


def _plan_in_force(path: Path, model_hash: int) -> Plan | None:
    """The plan in the file, where it is for this model."""
    try:
        old = read_plan(path)
    except PlanError:
        return None
    return old if old.model_hash in (0, model_hash) else None


def _by_hand(profile: ModelProfile, options: PlanOptions) -> Outlook:
    """A plan with exactly these k and w. Raises BudgetError when it does not fit the budget."""
    from planner.arms import in_bytes

    k, w = options.by_hand or (0, 1)
    check_layers(k, w, profile.model.n_layers)
    layout = Layout.PREFIX if options.layout is None else options.layout
    wanted = Plan(k, w, layout, model_hash=profile.model.hash)
    arm = in_bytes(profile, wanted)
    kv = _kv_use(options, profile.model.hash)
    outlook = outlook_of(
        profile, wanted, options.budget.n_bytes, _context(options, profile), kv, _floor(options, profile)
    )
    weights = arm.pinned_bytes + arm.window_bytes
    free = (outlook.ledger or {}).get("free_bytes", options.budget.cap_bytes - weights)
    if options.budget.cap_bytes and free < 0:
        need = options.budget.cap_bytes - free
        raise BudgetError(
            f"k={k}, w={w} needs {format_size(need)}, more than {format_size(options.budget.cap_bytes)}",
            "raise -m or lower K and W",
            floor_bytes=need,
        )
    return outlook


def _show(options: PlanOptions, profile: Path | None, model: str | None, *, json: bool) -> None:
    """Print the plan in the plan file, with its outlook where there is a profile of its model."""
    current = read_plan(options.plan_file)
    outlook, found = Outlook(current, budget_bytes=current.budget_bytes), None
    try:
        found = _load(profile, model)
        found.check_model(current.model_hash)
    except (ModelError, ProfileError) as error:
        note(f"no prediction: {error}")
    else:
        budget, kv = options.budget.following(current), _kv_use(options, found.model.hash)
        outlook = outlook_of(found, current, budget, _context(options, found), kv, _floor(options, found))
    if json:
        print_json(as_json(outlook, found, options.plan_file))
    else:
        emit(report(outlook, found) + "\n")
