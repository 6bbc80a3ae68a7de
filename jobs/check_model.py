"""Check a model folder and say what it is: the first thing to run after fetching real weights.

    python -m jobs.check_model FOLDER
    python -m jobs.check_model jinaai/jina-clip-v1 --dtype bfloat16 --device cuda
    python -m jobs.check_model FOLDER --write-canary

Everything that can be wrong with a model ends with one sentence on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jobs.cli import add_log_level, run_job, start_log, tell
from pipeline.model import load_model

if TYPE_CHECKING:
    from pipeline.model import Model

QUERY, LIKE = "a crimson fruit", "a red apple"
UNLIKE = ("a blue bicycle", "the annual tax report", "two dogs asleep on a sofa")
"""The article's sanity case: other words, same thing, against other things."""

N_TEXTS, N_IMAGES = 64, 32


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see `--help`."""
    args = _parser().parse_args(argv)
    start_log(args.log_level)

    def job() -> Mapping[str, Any]:
        report = check(args)
        if not args.json:
            _print(report)
        return report

    return run_job(job, as_json=args.json)


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Load the model, which proves its canaries, and measure it.

    Raises:
        ModelError: what is wrong with the model, in which file, and what to do.
    """
    from pipeline.model import canary

    start = time.perf_counter()
    model = load_model(
        args.model,
        device=args.device,
        dtype="float32" if args.write_canary else args.dtype,
        preprocessing=args.preprocessing,
        max_tokens=args.max_tokens,
        jpeg_draft=args.jpeg_draft,
        compile=args.compile,
        revision=args.revision,
        check_canary=not args.write_canary,
    )
    load_s = time.perf_counter() - start
    written = str(canary.write(model)) if args.write_canary else None
    card = asdict(model.card)
    if written:
        proof = "written"
    elif canary.is_published(model):
        proof = "published vector agrees"
    else:
        proof = "agrees" if model.card.has_canary else "none"
    return {
        **{key: card[key] for key in ("name", "path", "kind", "dim", "model_id", "fingerprint", "image_size")},
        **card["options"],
        "device": args.device,
        "n_parameters": card["n_parameters"],
        "weights_bytes": card["weights_bytes"],
        "digests": card["digests"],
        "canary": proof,
        "canary_path": written,
        "load_s": round(load_s, 3),
        "hello_world": hello_world(model),
        "sanity": sanity(model),
        "rates": rates(model, seconds=args.seconds),
    }


def hello_world(model: Model) -> dict[str, Any]:
    """The first coordinates of "hello world", beside those that the published weights are known to give."""
    from pipeline.model import canary

    got = [round(float(x), 4) for x in model.embed_texts(["hello world"])[0, :5]]
    off = max(abs(a - b) for a, b in zip(got, canary.HELLO_WORLD, strict=False))
    allowed = canary.HELLO_TOLERANCE[model.card.options.dtype]
    return {
        "first_five": got,
        "published": list(canary.HELLO_WORLD),
        "is_published": model.dim == 768 and off <= allowed,
    }


def sanity(model: Model) -> dict[str, Any]:
    """Cosines of a phrase with its paraphrase and with unrelated texts."""
    vectors = model.embed_texts([QUERY, LIKE, *UNLIKE])
    cosines = [round(float(x), 4) for x in vectors[1:] @ vectors[0]]
    others = dict(zip(UNLIKE, cosines[1:], strict=True))
    return {"query": QUERY, "like": {LIKE: cosines[0]}, "unlike": others, "holds": cosines[0] > max(cosines[1:])}


def rates(model: Model, *, seconds: float) -> dict[str, float]:
    """Inputs a second on this machine: short titles, whole descriptions, image preparation on one thread, and crops."""
    import numpy as np

    from pipeline.model.canary import draw

    titles = [
        f"{colour} linen dress number {i}" for i in range(N_TEXTS // 4) for colour in ("red", "blue", "grey", "sand")
    ]
    long = [
        f"{title}. " + "A light garment with a round neck, short sleeves and two pockets. " * 8 for title in titles[:16]
    ]
    photo = io.BytesIO()
    draw("gradient").resize((800, 600)).save(photo, "JPEG", quality=90)
    crop = model.prepare_image(photo.getvalue()).crop
    crops = np.repeat(crop[None], N_IMAGES, axis=0)
    out = {
        "titles_per_s": _rate(lambda: model.embed_texts(titles), len(titles), seconds),
        "descriptions_per_s": _rate(lambda: model.embed_texts(long), len(long), seconds),
        "photos_prepared_per_s": _rate(lambda: model.prepare_image(photo.getvalue()), 1, seconds),
        "crops_per_s": _rate(lambda: model.embed_crops(crops), len(crops), seconds),
    }
    counts = model.text_counts
    return {**out, "padding_share": round(counts.n_padding / (counts.n_tokens + counts.n_padding), 4)}


def _rate(work: Callable[[], object], n_items: int, seconds: float) -> float:
    work()  # the first call pays for allocation, and for compilation where that is on
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or not done:
        work()
        done += n_items
    return round(done / (time.perf_counter() - start), 1)


def _print(report: Mapping[str, Any]) -> None:
    sane, hello = report["sanity"], report["hello_world"]
    lines = {
        "model": f"{report['name']} ({report['kind']}, {report['dim']} dimensions, {report['image_size']} px)",
        "folder": report["path"],
        "size": f"{report['n_parameters']:,} parameters, {report['weights_bytes'] / 1e6:,.1f} MB",
        "model_id": report["model_id"],
        "fingerprint": f"{report['fingerprint']} ({report['dtype']})",
        "canary": report["canary_path"] or report["canary"],
        "hello world": f"{hello['first_five']}{', as published' if hello['is_published'] else ''}",
        "sanity": "holds" if sane["holds"] else "does NOT hold: these weights do not know general words",
    }
    for name, text in lines.items():
        tell(f"{name:<12} {text}")
    for text, cosine in (*sane["like"].items(), *sane["unlike"].items()):
        print(f"  {cosine:+.4f}  {QUERY!r} to {text!r}")
    print(f"loaded in {report['load_s']:.2f} s on {report['device']}")
    for name, value in report["rates"].items():
        print(f"  {name:<22} {value:,}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.check_model", description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="demo, a model folder, or a hub id")
    parser.add_argument("--write-canary", action="store_true", help="write canary.json: digests and golden vectors")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--preprocessing", default="shop", help="shop, or published: exactly the published code's")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="longer texts are cut (at most 8192)")
    parser.add_argument("--jpeg-draft", action="store_true", help="decode large JPEG files at reduced size")
    parser.add_argument("--compile", action="store_true", help="run the towers through torch.compile")
    parser.add_argument("--revision", help="commit hash of a hub model; pinned already for jinaai/jina-clip-v1")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each rate is measured")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    add_log_level(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
