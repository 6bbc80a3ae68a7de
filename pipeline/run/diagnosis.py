"""Why the GPUs are idle: where the actors' time went, and one sentence that names the setting to turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.config import Config
from pipeline.run.usage import Usage

PARTS = ("towers", "decode", "fetch", "read", "tokenise", "write", "idle", "other")
"""Of an actor's time: its towers at work; waiting for decoded images, fetched bytes, rows; for tokenising and writing;
no partition in hand; Python between all these."""
_MOSTLY_BUSY = 0.8
_WORTH_NAMING = 0.1
_FULL_THREADS = 0.75


@dataclass(frozen=True)
class Diagnosis:
    """What holds a run's towers up.

    Attributes:
        bottleneck: one of PARTS; `start` where starting the actors took most of their time, `none` without actors.
        share: of the actors' time that it took; for `start`, of the time in which they were held.
        sentence: that says so, and names the setting.
        towers_busy_share: of the time in which the actors could have embedded. The calls end with the vectors on the
            CPU, so this counts a GPU's copies as work, and never a kernel that was only queued.
        vcpus_per_gpu: of the nodes that embedded; None without GPUs.
        shares: of the actors' time, by part; together 1, or all 0 without actors.
    """

    bottleneck: str
    share: float
    sentence: str
    towers_busy_share: float
    vcpus_per_gpu: float | None
    shares: Mapping[str, float] = field(default_factory=dict)


def diagnose(usage: Usage, config: Config) -> Diagnosis:
    """Find what took most of the actors' time.

    The towers are followed: where none was at work, they waited, for decoded images or for a prepared batch, which
    belongs to reading and fetching in the proportion of the reader's own time, or stood still for tokenising and
    writing.

    Args:
        usage: what the actors did with their time.
        config: so that no setting is named that is turned already.
    """
    shares = shares_of(usage)
    vcpus = usage.vcpus_per_gpu
    if not usage.actors or not any(shares.values()):
        return Diagnosis("none", 0.0, "no actor embedded anything: nothing had to be embedded", 0.0, vcpus, shares)
    held = sum(actor.held_s for actor in usage.actors)
    start = sum(actor.start_s for actor in usage.actors)
    if 2 * start > held:
        share = min(1.0, start / held)
        sentence = (
            f"starting the actors took {share:.0%} of the time that they were held: the run is too short to keep them "
            "busy; gathering more changes into one run, or fewer pool.actors, would help"
        )
        return Diagnosis("start", share, sentence, shares["towers"], vcpus, shares)
    bottleneck, second = sorted(PARTS, key=lambda part: -shares[part])[:2]
    if bottleneck == "towers":
        sentence = _towers(usage, config, shares["towers"])
        if shares["towers"] < _MOSTLY_BUSY and shares[second] >= _WORTH_NAMING:
            sentence += f"; after that {_sentence(second, usage, config, shares[second])}"
    else:
        sentence = _sentence(bottleneck, usage, config, shares[bottleneck])
    return Diagnosis(bottleneck, shares[bottleneck], sentence, shares["towers"], vcpus, shares)


def shares_of(usage: Usage) -> dict[str, float]:
    """Where the actors' time went, by part; together 1."""
    busy, waits = usage.seconds, usage.waits
    reader = busy["read"] + waits["fetched"]
    to_fetch = waits["batch"] * min(1.0, waits["fetched"] / reader if reader else 0.0)
    working = sum(actor.working_s for actor in usage.actors)
    seconds = {
        "towers": busy["towers"],
        "decode": waits["decoded"],
        "fetch": to_fetch,
        "read": waits["batch"] - to_fetch,
        "tokenise": busy["tokenise"],
        "write": busy["write"],
        "idle": max(0.0, usage.actor_s - working),
    }
    seconds["other"] = max(0.0, usage.actor_s - sum(seconds.values()))
    total = sum(seconds.values())
    return {part: seconds[part] / total if total > 0 else 0.0 for part in PARTS}


def _towers(usage: Usage, config: Config, share: float) -> str:
    busy = f"the towers were busy {share:.0%} of the time"
    if not usage.gpus:
        return f"{busy}: that is the CPU's own speed; GPUs, or more machines with more pool.actors, would help"
    knobs = ["model.dtype=bfloat16 (other vectors: all is embedded anew)"] if config.model.dtype == "float32" else []
    knobs += [] if config.model.compile else ["model.compile=true"]
    return f"{busy}: that is the GPU's own speed; {_any([*knobs, 'more GPUs (pool.actors)'])} would help"


def _sentence(part: str, usage: Usage, config: Config, share: float) -> str:
    """What took the time, and what would help."""
    waited = f"the towers waited {share:.0%} of the time for"
    share_a_gpu = "pool.gpus_per_actor=0.5, two actors on a GPU" if usage.gpus else "more pool.actors"
    if part == "decode":
        return f"{waited} decoded images; {_decode(usage, config)}"
    if part == "fetch":
        return f"{waited} images to be fetched; {_fetch(usage, config)}"
    if part == "read":
        carried = " and fewer columns.carried" if config.columns.carried else ""
        return (
            f"{waited} rows of the catalog: a faster store, or one nearer to the workers,{carried} would help; so "
            f"would more readers beside each other: {share_a_gpu}"
        )
    if part == "tokenise":
        return (
            f"tokenising took {share:.0%} of the towers' time: {share_a_gpu}, or a smaller model.max_tokens (other "
            "vectors: all is embedded anew), would help"
        )
    if part == "write":
        return (
            f"writing staged files took {share:.0%} of the towers' time: staging.path on a faster disk, or on a store "
            "nearer to the workers, would help"
        )
    if part == "idle":
        return (
            f"the actors had no partition in hand {share:.0%} of the time: there are too few partitions for "
            f"{usage.at_once} actors, or unequal ones; a smaller catalog.partition_bytes cuts large files, and fewer "
            "pool.actors cost less"
        )
    return f"Python between the stages took {share:.0%} of the towers' time: {share_a_gpu}, would help"


def _decode(usage: Usage, config: Config) -> str:
    threads = usage.decode_threads
    used = _threads_used(usage, usage.seconds["decode"])
    per = f"{usage.vcpus_per_gpu:g} vCPUs per GPU" if usage.vcpus_per_gpu is not None else "no GPU"
    said = f"decoding used {used:.1f} of {threads} threads of each actor, with {per}"
    if usage.gpus and used < _FULL_THREADS * threads:  # on a CPU the towers take the rest
        return f"{said}: fewer and larger Parquet files, or a larger catalog.partition_bytes, keep the threads fed"
    knobs = (
        ["more vCPUs per GPU", "pool.decode_threads"]
        if usage.gpus
        else ["more cores, or machines for more pool.actors"]
    )
    if not config.images.jpeg_draft:
        knobs.append("images.jpeg_draft=true (other vectors: all is embedded anew)")
    return f"{said}: {_any([*knobs, 'smaller images'])} would help"


def _fetch(usage: Usage, config: Config) -> str:
    threads = usage.fetch_threads
    if not threads:
        readers = f"{usage.decode_threads} threads of each actor read them"
        return f"{readers}: a faster disk or more pool.decode_threads would help"
    used = _threads_used(usage, usage.seconds["fetch"])
    said = f"fetching used {used:.1f} of {threads} threads of each actor"
    knobs = [f"fetch.threads over {threads}"]
    if config.fetch.http:
        knobs.append(f"fetch.per_host over {config.fetch.per_host}, if the host bears it")
    return f"{said}: {_any([*knobs, 'workers nearer to the images'])} would help"


def _threads_used(usage: Usage, seconds: float) -> float:
    """How many threads of an actor were busy on average while it worked."""
    working = sum(actor.working_s for actor in usage.actors)
    return seconds / working if working > 0 else 0.0


def _any(things: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(things[:-1]), things[-1])))
