"""CIPO, reconstructed from the published descriptions of arXiv 2605.14539: `torchrun cipo_fast/train.py`.

    torchrun cipo_fast/train.py [configs/x.yaml ...] [key.path=value ...]
    python cipo_fast/train.py ... --dry-run [--world RANKS] [--device-memory GB]

Without arguments it trains the embedded model on the embedded task, on whatever device there is.
"""

import os
import sys

if __package__ in (None, ""):
    sys.path.pop(0)  # run as a file: this folder's names (config, evaluate...) must not hide installed packages
# On CPU: threads that spin long at a barrier stall a small model as soon as another process wants a core.
os.environ["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "1000")

import copy
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from cipo_kernels.tree_attention.flash_versions import activate_newest_flash_attention
from torch.distributed.device_mesh import DeviceMesh

from cipo_fast.alarms import Alarms
from cipo_fast.audit.own import own_metrics
from cipo_fast.chat import Chat, pinned_date
from cipo_fast.checkpoint import SHAPE, CheckpointFailed, Checkpoints, Progress, export, export_shape
from cipo_fast.cipo.anchors import AnchorCounts, select_anchors
from cipo_fast.cipo.metrics import Metrics, batch_metrics, nudge_metrics, verdict_metrics
from cipo_fast.cipo.nudge import draw_hints
from cipo_fast.cipo.objective import lambda_corr_at, right_weight
from cipo_fast.cipo.prompts import CorrectionPrompts
from cipo_fast.cipo.replay import ReplayState, retention_target, retry_rate, update_replay
from cipo_fast.config import Config, cautions, comparison, configs_dir, parse_args
from cipo_fast.distributed import gather, is_main, leave_after, on_main, prepared_group, starts_first
from cipo_fast.embedded.model import embedded_config
from cipo_fast.embedded.prepare import prepare
from cipo_fast.engines import build_engine, check_engine, fit_to_engine, fit_to_model, starting
from cipo_fast.errors import PolicyBroken, Preempted, TrainingStopped, command, put
from cipo_fast.evaluation.report import Evaluation
from cipo_fast.evaluation.sample import evaluate
from cipo_fast.learner import Learner
from cipo_fast.liger import use_liger
from cipo_fast.marking import build_judges, failures_of, refuse_failures
from cipo_fast.model import load_model, load_shape, load_tokenizer
from cipo_fast.packing import CostModel
from cipo_fast.policy import ATTENTION, build_policy, cost_model, flops_model, refuse_unsupported
from cipo_fast.preemption import StopSignals
from cipo_fast.recorder import Recorder
from cipo_fast.records import Anchor, Group
from cipo_fast.rollout import EngineFailure, Sampling
from cipo_fast.run_dir import check_writable, opened
from cipo_fast.sampling import Prompt, Sampler, encode_dataset, fitting, fitting_hints, prompts_of_step, seed_for
from cipo_fast.stock import check_on_one_rank
from cipo_fast.sync import WeightSync
from cipo_fast.tasks import check_data, load_dataset
from cipo_fast.trackers import check_trackers
from cipo_fast.try_out import prepare_judges, refuse_exploits, with_good_golds
from cipo_fast.updates import learn, update_metrics
from cipo_fast.view import View, summary_table

FILES = """\
Files are merged in their order, settings over them; the last one counts. docs/configuration.md lists all settings.

x.yaml is the file of this folder or, where there is none, the recipe of that name in """
MAX_SKIPS = 3  # non-finite updates in a row that stop a run
NO_SYNC: Metrics = dict.fromkeys(
    ("sync/parity_max_abs", "sync/parity_mean_abs", "sync/changed", "sync/gb", "time/sync_s", "time/probe_s")
)


@dataclass
class Run:
    """What the loop works with; built once by `build`."""

    config: Config
    train: list[Prompt]
    held_out: list[Prompt]
    correct: CorrectionPrompts
    sampler: Sampler
    learner: Learner
    sync: WeightSync
    cost: CostModel  # what packs are balanced by
    flops: CostModel  # what is reported
    sampling: Sampling
    view: View
    alarms: Alarms
    checkpoints: Checkpoints
    sources: list[str]  # of its training problems
    signals: StopSignals = field(default_factory=StopSignals)
    ahead: Future["Batch"] | None = None  # the next step's batch, when rollout.overlap=1
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))


@dataclass(frozen=True)
class Batch:
    """What a step learns from, and the replay controller's state after it. `failures` has a line for each answer that
    nobody could judge: those are in no group."""

    groups: list[Group]
    anchors: list[Anchor]
    counts: AnchorCounts
    rho: float
    replay: ReplayState
    failures: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 1 stopped (state saved), 2 bad input (one line says what), 75 ended by a signal
    (state saved; the same command goes on), 130 a second Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)

    def checked() -> Config:
        config = parse_args(args)
        if starts_first():
            check_writable(config.run_dir)
        return config

    def body() -> None:
        if {"-h", "--help"} & set(args):
            if starts_first():
                put(f"{(__doc__ or '').strip()}\n{FILES}{configs_dir()}.")
            return
        if "--dry-run" in args:
            from cipo_fast.dry_run import dry_run

            if starts_first():
                put(dry_run(args, embedded_config))
            return
        with StopSignals() as signals, prepared_group(checked) as (mesh, config):
            train(config, mesh, signals)

    return command(body, "interrupted: the same command goes on from the newest checkpoint")


def train(config: Config, mesh: DeviceMesh, signals: StopSignals) -> None:
    """The whole job: open the folder, build, warm up, evaluate, loop, evaluate, export."""
    check_data(config)
    check_engine(config, mesh.device_type)  # before a warm start, not after it
    check_trackers(config)
    title = (
        f"cipo_fast · {config.run.name} · {config.model.path} · seed {config.seed} · {mesh.device_type} x {mesh.size()}"
    )
    shown = View(config.run.view, config.train.steps, title, not is_main(), config.eval.every)
    with shown as view, ExitStack() as open_files:
        folder = open_files.enter_context(opened(config, mesh.size()))
        for line in (*folder.lines, *comparison(config), *cautions(config)):
            view.say(line)
        config = gather([pinned_date(config, folder.resume)])[0]  # one day on all ranks, recorded with the run
        given = config  # what is recorded; `embedded` is a folder from here on
        if config.model.path == "embedded":
            config = prepare(config, mesh, view.note, signals.check)
        signals.check()
        run, progress = build(config, mesh, view, open_files, folder.resume)
        run.signals = signals
        signals.install()
        recorder = Recorder(given, run.sampler.chat.pieces)
        open_files.callback(recorder.close)
        held_out = [prompt.problem for prompt in run.held_out]
        written(config, lambda: recorder.open(folder, progress.step if folder.resume else None, held_out))
        model, tokenizer = run.learner.policy.model, run.sampler.chat.tokenizer
        written(config, lambda: export_shape(config.run_dir / SHAPE, model, tokenizer))
        with reported(config, view):
            if progress.before is None:
                before = timed_evaluation(run, progress, "before training")
                written(config, partial(recorder.evaluation, before, progress))
                progress = replace(progress, before=before)
            progress = loop(run, recorder, progress)
            after = timed_evaluation(run, progress, "after training")
            finish(run, recorder, view, progress, after)


def loop(run: Run, recorder: Recorder, progress: Progress) -> Progress:
    """Steps to the last one. What a checkpoint holds is recorded, so that a run that goes on has every row once."""
    config, steps = run.config, run.config.train.steps
    while True:
        if due(progress.step, config.eval.every) and progress.evaluated < progress.step < steps:
            result = timed_evaluation(run, progress, f"at step {progress.step}")
            with saved_if_stopped(run, progress):
                written(config, partial(recorder.evaluation, result, progress))
            progress = replace(progress, evaluated=progress.step)
        if progress.step >= steps:
            return progress
        with profiled(config, progress.step + 1):
            metrics, batch, progress, stop = cipo_step(run, progress)
        run.view.step(metrics)
        with saved_if_stopped(run, progress):
            written(config, partial(recorder.step, metrics, batch.groups, batch.anchors))
            if stop is not None:
                raise stop
            if progress.most_in_a_row >= MAX_SKIPS:
                raise TrainingStopped(
                    f"{MAX_SKIPS} updates in a row were not finite; they are in no weight, {config.run_dir / 'failed'} "
                    "holds their packs; a lower optim.lr may help"
                )
        if due(progress.step, config.checkpoint.every) or progress.step == steps:
            save(run, progress)
        with saved_if_stopped(run, progress):
            run.signals.check()


@contextmanager
def profiled(config: Config, step: int) -> Iterator[None]:
    """Of `run.profile_step` the first rank writes a Chrome trace."""
    if step != config.run.profile_step:
        yield
        return
    from torch.profiler import profile

    with profile() as found:
        yield
    written(config, lambda: found.export_chrome_trace(str(config.run_dir / f"profile-step-{step}.json.gz")))


def save(run: Run, progress: Progress) -> None:
    """A checkpoint that cannot be written is missed at the end alone: till then the next one may do."""
    try:
        run.checkpoints.save(run.learner, progress)
    except CheckpointFailed as failure:
        if progress.step == run.config.train.steps:
            raise
        run.view.say(f"{failure}; the run goes on without it")


def written(config: Config, write: Callable[[], None]) -> None:
    """The first rank writes; if it cannot, all stop."""

    def attempt() -> None:
        try:
            write()
        except OSError as error:
            raise TrainingStopped(f"{config.run_dir} cannot be written ({error})") from None

    on_main(attempt)


# ------------------------------------------------------------------------------------------------------- one step


def cipo_step(run: Run, progress: Progress) -> tuple[Metrics, Batch, Progress, TrainingStopped | None]:
    """One step of CIPO: sample, choose anchors, correct, learn, sync, adapt rho. A sync that fails for good ends the
    run, but the step is done: its row is to be written, and its state saved."""
    config, step, started = run.config, progress.step + 1, time.perf_counter()
    with saved_if_stopped(run, progress):
        batch = sampled_batch(run, step, progress)
    run.sampler.engine.release()
    sampled = time.perf_counter()

    updates, tokens, old_logp_s = learn(run, batch.groups, batch.anchors, step)
    learned = time.perf_counter()

    wait_for_batch_ahead(run)
    waited = time.perf_counter()
    progress = progress.after_step(batch.replay, [update.applied for update in updates], waited - started)
    run.sync.watch(batch.groups)
    sync, stop = NO_SYNC, None
    try:
        sync = run.sync.publish(step)
    except PolicyBroken:
        raise
    except TrainingStopped as error:
        stop = error
    progress = replace(
        progress,
        seconds=progress.seconds + time.perf_counter() - waited,
        sampled_tokens=progress.sampled_tokens + int(tokens["tokens/sampled"] or 0),
        flops=progress.flops + sum(tokens[key] or 0.0 for key in ("flops/sample", "flops/train")),
    )

    generate_s, verify_s = run.sampler.take_times()
    if config.rollout.overlap:  # what the loop waited for, not what went on beside it
        generate_s, verify_s = sampled - started + waited - learned, 0.0
    step_s = time.perf_counter() - started
    train_s = learned - sampled - old_logp_s
    metrics: Metrics = {
        "step": step,
        "seed": config.seed,
        **batch_metrics(batch.groups, batch.anchors, batch.counts),
        **verdict_metrics(batch.groups, batch.anchors, len(batch.failures), run.sources),
        **own_metrics(batch.groups, batch.anchors),
        **(nudge_metrics(batch.groups) if config.nudge.hints else {}),
        "rollout/prefix_hit_rate": run.sampler.take_prefix_hit_rate() if stop is None else None,
        "correction/lambda_corr": lambda_corr_at(step, config.correction),
        "correction/right_weight": right_weight(batch.anchors, config, step),
        "replay/rho": batch.rho,
        "replay/retention": batch.replay.retention,
        "replay/attainable": batch.replay.attainable,
        "replay/target": retention_target(batch.replay, config.replay),
        **update_metrics(updates),
        **tokens,
        **sync,
        "time/generate_s": generate_s,
        "time/verify_s": verify_s,
        "time/old_logp_s": old_logp_s,
        "time/train_s": train_s,
    }
    metrics["time/idle_s"] = step_s - sum(v for k, v in metrics.items() if k.startswith("time/") and v)
    metrics["time/step_s"] = step_s
    metrics["memory/peak_gb"] = peak_gb()
    if batch.failures:
        many = f"{len(batch.failures)} answers could not be judged and are left out"
        run.view.say(f"step {step}: {many}; the first: {batch.failures[0]}")
    alarms, lines = run.alarms.step(metrics, batch.groups, batch.anchors)
    for line in lines:
        run.view.say(line)
    metrics |= alarms
    return metrics, batch, progress, stop


@contextmanager
def saved_if_stopped(run: Run, progress: Progress) -> Iterator[None]:
    """A stop inside loses nothing: `progress` is saved with the weights as they are."""
    try:
        yield
    except PolicyBroken:
        raise
    except (TrainingStopped, Preempted) as stop:
        if progress.step == 0 and progress.before is None:
            raise  # nothing has been done
        try:
            where = run.checkpoints.save(run.learner, progress)
        except CheckpointFailed as failure:
            raise TrainingStopped(f"{stop}; {failure}") from stop.__cause__
        raise type(stop)(f"{stop}; saved as {where}") from stop.__cause__


def sampled_batch(run: Run, step: int, progress: Progress) -> Batch:
    """The step's batch: with overlap the one sampled meanwhile, else a new one. With overlap the next one is begun."""
    ahead, run.ahead = run.ahead, None
    batch = ahead.result() if ahead is not None else sample(run, step, progress.replay)
    if run.config.rollout.overlap and step < run.config.train.steps:
        run.ahead = run.pool.submit(sample, run, step + 1, batch.replay)
    return batch


def wait_for_batch_ahead(run: Run) -> None:
    """A sync changes the weights that a batch is sampled with, so it waits. A batch that the engine failed is sampled
    anew, by the next step, with the weights that the sync brings; the sync repairs the engine where that is needed."""
    if run.ahead is not None and isinstance(run.ahead.exception(), EngineFailure):
        run.view.say(f"the batch sampled ahead is lost: {run.ahead.exception()}")
        run.ahead = None


def sample(run: Run, step: int, replay: ReplayState) -> Batch:
    """Rollouts, the anchors among them, their corrections: all of one policy version. What nobody could judge is in
    none of them; too much of that is a TrainingStopped."""
    config = run.config
    rng = np.random.default_rng(seed_for(config.seed, step, "anchors"))
    prompts = prompts_of_step(run.train, config, step)
    asked = rollouts(run, prompts, step)
    failures, groups = failures_of(asked), [group for group in asked if group.rollouts]
    answers = len(asked) * config.rollout.samples_per_prompt
    expected = config.anchors_per_step * config.samples_per_anchor if groups else 0
    refuse_failures(failures, answers + expected, config.verify.max_failed)
    chosen, counts = select_anchors(groups, config.anchors_per_step, replay.rho, config.correction, run.correct, rng)
    run.sampler.correct(chosen, config.samples_per_anchor, run.sampling, step, "correction")
    failures += failures_of([], chosen)
    answers += len(chosen) * config.samples_per_anchor
    refuse_failures(failures, answers, config.verify.max_failed)
    anchors = [anchor for anchor in chosen if anchor.corrections]
    kept = [r.reward for anchor in anchors if anchor.right for r in anchor.corrections]
    state = update_replay(replay, kept, retry_rate(groups, anchors), config.replay)
    return Batch(groups, anchors, counts, replay.rho, state, failures)


def rollouts(run: Run, prompts: list[Prompt], step: int) -> list[Group]:
    """G judged rollouts of each prompt, some of them with a hint where `nudge.hints` asks for that."""
    config, n = run.config, run.config.rollout.samples_per_prompt
    if not config.nudge.hints:
        return run.sampler.groups(prompts, n, run.sampling, step, "rollout")
    rng = np.random.default_rng(seed_for(config.seed, step, "hints"))
    hints = [draw_hints(list(prompt.hinted), n, config.nudge, rng) for prompt in prompts]
    return run.sampler.nudged(prompts, hints, run.sampling, step, "rollout")


# ----------------------------------------------------------------------------------------------- before and after


def build(
    config: Config, mesh: DeviceMesh, view: View, open_engine: ExitStack, resume: bool = False
) -> tuple[Run, Progress]:
    """Load, start the engine, shard, resume; everything that can be refused is refused here."""
    dataset = load_dataset(config, view.say)
    judges = open_engine.enter_context(build_judges(config, view.say))
    asked = [*dataset.train, *dataset.held_out]
    if prepare_judges(judges, asked):
        refuse_exploits(judges, asked, view.say)
    dataset = replace(dataset, train=with_good_golds(dataset.train, judges, view.say))
    chat = Chat(load_tokenizer(config), config.data)
    train_prompts, held_out = encode_dataset(dataset, chat, config, view.say)
    chat.refuse_beyond(load_shape(config).get_text_config().vocab_size)
    model = load_model(config, ATTENTION)
    config = fit_to_model(config, model.config, view.say)
    refuse_unsupported(model, config.max_model_len)
    check_on_one_rank(model, config, [p.token_ids for p in train_prompts[:3]])
    view.say(f"an answer ends with {chat.names(chat.end_ids(model.generation_config))}")
    if config.rollout.engine != "local":
        view.say(starting(config))
    engine = build_engine(config, model, chat, mesh.device_type, view.say)
    open_engine.callback(engine.close)
    config = fit_to_engine(config, engine, view.say)
    limit = config.data.max_prompt_tokens
    train_prompts = fitting_hints(fitting(train_prompts, limit, "data.train", view.say), config, view.say)
    held_out = fitting(held_out, limit, "held-out problems", view.say)
    correct = CorrectionPrompts(chat, config.correction)
    view.say(f"{model.num_parameters():,} parameters, {len(train_prompts):,} problems, {len(held_out)} held out")

    if (line := use_liger(model, config, mesh.device_type)) is not None:
        view.say(line)
    if config.model.attention == "flash" and mesh.device_type == "cuda":
        version = activate_newest_flash_attention(torch.device("cuda", torch.cuda.current_device()))
        view.say(f"attention on {version}")
    cost = cost_model(model.config, model.num_parameters())
    flops = flops_model(model.config, model.num_parameters())
    reference_model = copy.deepcopy(model) if config.loss.beta > 0 else None
    policy = build_policy(model, config, mesh)
    sync = WeightSync(policy, engine, config, [p.token_ids for p in train_prompts])
    engine.publish = sync.republish
    if config.rollout.overlap:
        engine.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.run.rank_timeout_s))
    sampler = Sampler(engine, chat, config.seed, judges, engine.group)
    reference = build_policy(reference_model, config, mesh) if reference_model is not None else None
    updates = config.train.steps * config.train.updates_per_step
    learner = Learner(policy, config.optim, updates, reference)
    progress = Progress(0, ReplayState(config.replay.rho0))
    checkpoints = Checkpoints(config.run_dir / "checkpoints", config.checkpoint.keep, view.say)
    if resume:
        progress = checkpoints.load_newest(learner)
        view.say(f"resumed after step {progress.step}")
    sync.publish(progress.step)
    sampling = Sampling(config.rollout.temperature, config.rollout.top_p, config.rollout.max_tokens)
    alarms = Alarms(config.run.alarm_after, config.sync.alarm_outside)
    sources = sorted({prompt.problem.source for prompt in train_prompts})
    run = Run(
        config, train_prompts, held_out, correct, sampler, learner, sync, cost, flops, sampling, view, alarms,
        checkpoints, sources,
    )  # fmt: skip
    return run, progress


def timed_evaluation(run: Run, progress: Progress, when: str) -> Evaluation:
    """All of it is kept in `evaluations/step-N`; one that was ended on its way goes on."""
    started, total = time.perf_counter(), len(run.held_out)
    folder = run.config.run_dir / "evaluations" / f"step-{progress.step:05d}"
    about = {"model": f"{run.config.run_dir} step {progress.step}"}

    def shown(done: int) -> None:
        run.view.busy(f"evaluating {when}: {done} of {total} held-out problems")

    with saved_if_stopped(run, progress):
        results = evaluate(run.sampler, run.held_out, run.correct, run.config, folder, about, run.signals.check, shown)
    run.view.evaluated(when, results.values, time.perf_counter() - started)
    return results.values


def finish(run: Run, recorder: Recorder, view: View, progress: Progress, after: Evaluation) -> None:
    """Export, summary, table. Gathering the weights is a collective; the rest is the first rank's."""
    config, before = run.config, progress.before
    assert before is not None
    weights = {}
    if config.checkpoint.export:
        for name, tensor in run.learner.policy.full_weights():  # a collective; only the first rank keeps what it gets
            if is_main():
                weights[name] = tensor.cpu()

    def write() -> None:
        recorder.evaluation(after, progress)
        if config.checkpoint.export:
            export(config.run_dir / "model", run.learner.policy.model, weights, run.sampler.chat.tokenizer)
        saved = recorder.tokens_saved()
        recorder.summary(
            {
                "before": before,
                "after": after,
                "tokens_saved": saved,
                "steps": progress.step,
                "skipped": progress.skipped,
                "seconds": progress.seconds,
                "config": recorder.config.model_dump(mode="json"),
            }
        )
        view.say("")
        view.console.print(summary_table(before, after, saved))
        view.say(f"{progress.step} steps in {progress.seconds:.0f}s; everything is in {config.run_dir}/")

    with saved_if_stopped(run, progress):
        written(config, write)


@contextmanager
def reported(config: Config, view: View) -> Iterator[None]:
    """At the end of what is inside, and where it is stopped, the run's page is written. Not after a signal: who sent it
    may not wait."""
    try:
        yield
    except TrainingStopped:
        write_report(config, view)
        raise
    write_report(config, view)


def write_report(config: Config, view: View) -> None:
    """All of the page is in the run's files, so whatever fails here is a line, and no more."""
    if not (config.run.report and is_main()):
        return
    from cipo_fast.report.page import write_page

    path = config.run_dir / "report.html"
    try:
        write_page([config.run_dir], path)
    except Exception as error:
        view.say(f"warning: {path} could not be written ({type(error).__name__}: {error}); the run is whole without it")
    else:
        view.say(f"to look at: {path}")


def peak_gb() -> float:
    """The first rank's: of its GPU's memory that tensors took, or of the process where it has none; so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


if __name__ == "__main__":
    leave_after(main)
