"""How much guidance do digits on demand want? FID and label accuracy over its strength, into reports/guidance.csv.

Each strength is scored with several seeds by the monitor's scorer: digits asked for in the training set's own proportions,
against the training-set statistics (the test set is not used to choose anything). What scripts take by default is
`flags.DIGIT_GUIDANCE`.

    python benchmarks/guidance.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import flags
from checkpoint import file_sha256, load_generator
from evaluation import FLOOR_SIZES, Extractor, training_scorer
from metrics import estimate
from utils import ExpectedError, choose_device, run_script, write_csv

FIGURES = ("fid", "fid_ratio", "is", "label_accuracy")


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--model", default="checkpoints/best_DIFF.pt", help="checkpoint of a diffusion model")
    flag("--guidance", type=flags.guidance_weight, nargs="+", default=[1.0, 1.1, 1.2, 1.3, 1.5, 2.0], help="strengths")
    flag("--steps", type=flags.positive_int, default=15, help="of DPM-Solver++, of two evaluations each but for strength 1")
    flag("--n", type=int, choices=FLOOR_SIZES, default=1000, help="samples for each seed: a size whose floor is known")
    flag("--seeds", type=flags.positive_int, default=3, help="seeds of each strength")
    flag("--data-dir", default=None, help="where MNIST/raw lies (default: $MNIST_DIR, else data)")
    flag("--device", default="auto", help="auto, cpu, cuda, ...")
    flag("--out", type=Path, default=Path("reports/guidance.csv"), help="the table to write")
    args = parser.parse_args()

    device = choose_device(args.device)
    model = load_generator(args.model, device)
    if "guidance" not in model.SAMPLE_OPTIONS or model.config.num_classes != data.NUM_CLASSES:
        raise ExpectedError(f"{args.model} holds no diffusion model of ten classes, which could be guided")
    digits = data.load_digits("mnist", "train", args.data_dir or data.default_data_dir(), device)
    extractor, rows = Extractor(device), []
    for guidance in args.guidance:
        options = {"steps": args.steps, "guidance": guidance}
        scorers = (training_scorer(digits, extractor, args.n, seed, True, options) for seed in range(args.seeds))
        scores = [scorer(model) for scorer in scorers]
        row = {"checkpoint": file_sha256(args.model)[:16], "n": args.n, "seeds": args.seeds, **options}
        for name in FIGURES:
            row[name], row[f"{name}_std"] = estimate([figures[name] for figures in scores])
        rows.append(row)
        print(
            f"guidance {guidance:4.2f}  ",
            "  ".join(f"{name} {row[name]:.4g} +- {row[f'{name}_std']:.2g}" for name in FIGURES),
        )
    write_csv(args.out, rows)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)
