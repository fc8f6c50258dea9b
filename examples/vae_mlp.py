"""An intrusion detector that is no image classifier: PTQ and QAT at 8 to 2 bits.

A variational autoencoder's 8-dimensional latent feeds an MLP that finds attacks (as in arXiv
2511.03201). The noise of the latent and the decoder exist only in training, and stay in float; the
exported file is encoder and detector.

    python examples/vae_mlp.py --nsl-kdd KDDTest+.txt --json results.json
    python examples/vae_mlp.py --data-root n-baiot --json results.json
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import divqat
from divqat._util.devices import hardware, versions
from divqat._util.files import write_json
from divqat.export import export_onnx

sys.path.insert(0, str(Path(__file__).parent))
from traffic import Traffic, read_n_baiot, read_nsl_kdd, split

LATENT, BATCH = 8, 256
BITS = (8, 7, 6, 5, 4, 3, 2)
METHODS = ("PTQ (minmax)", "PTQ (best)", "QAT")
BEST: dict[str, Any] = {
    "activation_ranges": "mse", "weight_ranges": "mse", "rounding": "learned",
    "rounding_steps": 300, "bias_correction": True,
}  # fmt: skip


class Detector(nn.Module):
    """Encoder, decoder and detector; in eval mode logits [N, 2] of the latent's mean."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(32, LATENT), nn.Linear(32, LATENT)
        self.decoder = nn.Sequential(nn.Linear(LATENT, 64), nn.ReLU(), nn.Linear(64, features))
        self.detector = nn.Sequential(nn.Linear(LATENT, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        mean = self.mean(h)
        if not self.training:
            return self.detector(mean)
        log_variance = self.log_variance(h)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.detector(z), self.decoder(z), mean, log_variance


def loss_of(answer: Any, x: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, and a tenth of reconstruction error and KL(N(μ, σ²)‖N(0, 1))."""
    logits, decoded, mean, log_variance = answer
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    return F.cross_entropy(logits, labels) + 0.1 * (F.mse_loss(decoded, x) + 0.01 * kl)


def learn(model: nn.Module, data: Traffic, epochs: int, lr: float, seed: int) -> nn.Module:
    """Train by Adam on a shuffled training part; returns ``model`` in eval mode."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    steps = epochs * -(-len(data.train) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for epoch in range(epochs):
        if epoch and epoch == 2 * epochs // 3:
            divqat.freeze_observers(model)
        for rows in torch.randperm(len(data.train)).split(BATCH):
            x = data.train[rows]
            loss = loss_of(model(x), x, data.train_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def quantized(net: nn.Module, data: Traffic, method: str, bits: int, epochs: int, seed: int) -> Any:
    """The detector with weights of ``bits`` bits, and its activations of 8, by a method."""
    config = divqat.preset("x86", weight_bits=bits, first_last_bits=bits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the decoder is meant to be in float
        model = divqat.prepare(net, replace(config, skip=("decoder",)), data.train[:2])
    if method == "QAT":
        return learn(model, data, epochs, 1e-3, seed)
    rows = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:1024]
    options = BEST if method == "PTQ (best)" else {}
    return divqat.ptq(model, data.train[rows].split(256), seed=seed, **options).eval()


def scores(file: Path, data: Traffic) -> dict[str, float]:
    """Accuracy, F1, false alarms (share of normal traffic) of a file in ONNX Runtime, its bytes,
    and the median microseconds of one vector on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(file), options)
    name, x = session.get_inputs()[0].name, data.test.numpy()
    alarms = torch.from_numpy(session.run(None, {name: x})[0]).argmax(1).bool()
    attacks = data.test_labels.bool()
    hits = int((alarms & attacks).sum())
    seconds = []
    for _ in range(200):
        start = time.perf_counter()
        session.run(None, {name: x[:1]})
        seconds.append(time.perf_counter() - start)
    return {
        "accuracy": float((alarms == attacks).double().mean()),
        "f1": 2 * hits / max(1, int(alarms.sum()) + int(attacks.sum())),
        "false_alarms": float(alarms[~attacks].double().mean()),
        "bytes": file.stat().st_size,
        "microseconds": 1e6 * median(seconds),
    }


def measure(data: Traffic, seed: int, bits: list[int], epochs: int) -> list[dict[str, Any]]:
    """The rows of a seed: full precision, then each method at each width."""
    torch.manual_seed(seed)
    net = Detector(data.train.shape[1])
    learn(net, data, epochs, 2e-3, seed)
    deployed = (net.body, net.mean, net.detector)
    weights = sum(p.numel() for part in deployed for p in part.parameters() if p.dim() == 2)

    def row(method: str, width: int, file: Path) -> dict[str, Any]:
        packed = weights * width // 8
        return {"seed": seed, "method": method, "bits": width, "packed_bytes": packed,
                **scores(file, data)}  # fmt: skip

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        batch = torch.export.Dim("batch")
        program = torch.onnx.export(
            net, (data.train[:2],), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
        )
        assert program is not None
        file.write_bytes(program.model_proto.SerializeToString())
        rows.append(row("full precision", 32, file))
        print(line(rows[-1]), flush=True)
        for width in bits:
            for method in METHODS:
                model = quantized(net, data, method, width, max(1, epochs // 2), seed)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # 8 bits may saturate; scores() runs without
                    export_onnx(model, data.train[:2], file)
                rows.append(row(method, width, file))
                print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    return (
        f"seed {row['seed']}, {row['method']}, {row['bits']} bits: accuracy {row['accuracy']:.2%}, "
        f"F1 {row['f1']:.4f}, false alarms {row['false_alarms']:.2%}, {row['bytes']} bytes, "
        f"{row['microseconds']:.0f} µs"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds, as Markdown."""
    columns = {
        "accuracy": (100, 2), "f1": (100, 2), "false_alarms": (100, 2),
        "packed_bytes": (1 / 1024, 1), "bytes": (1 / 1024, 1), "microseconds": (1, 0),
    }  # fmt: skip
    head = ["method", "bits", "accuracy %", "F1 %", "false alarms %", "weights, packed, KiB",
            "file, KiB", "µs"]  # fmt: skip
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for method, bits in dict.fromkeys((row["method"], row["bits"]) for row in rows):
        group = [row for row in rows if (row["method"], row["bits"]) == (method, bits)]
        cells = []
        for name, (factor, digits) in columns.items():
            values = [factor * row[name] for row in group]
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.{digits}f}{spread}")
        lines.append([method, str(bits), *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(words: list[str] | None = None) -> None:
    """Read the data, measure every method, print a table, and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--nsl-kdd", type=Path, metavar="FILE", help="NSL-KDD's text file, or .gz")
    data.add_argument("--data-root", type=Path, metavar="DIR", help="folder of N-BaIoT's CSV files")
    parser.add_argument("--rows", type=int, default=2000, help="of each of N-BaIoT's files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS), choices=BITS)
    parser.add_argument("--epochs", type=int, default=20, help="of full precision; QAT has half")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    read = read_nsl_kdd(args.nsl_kdd) if args.nsl_kdd else read_n_baiot(args.data_root, args.rows)
    traffic = split(*read)
    given = [Path(word).name for word in words or sys.argv[1:]]
    rows = []
    for seed in args.seeds:
        rows += measure(traffic, seed, args.bits, args.epochs)
        if args.json:
            write_json(args.json, {
                "command": shlex.join(["python", "examples/vae_mlp.py", *given]),
                "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
                "hardware": hardware(), "versions": versions(), "rows": rows,
            })  # fmt: skip
    print(table(rows))


if __name__ == "__main__":
    main()
