"""Makes evaluation.json: what pytorch-fid and torch-fidelity say of numbers given by formula.

    pip install torch torchvision pytorch-fid torch-fidelity scipy
    python distill/tests/golden/make_evaluation.py

pytorch-fid's own network runs here, with weights by formula instead of those it would download.
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from pytorch_fid import fid_score, inception
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric


def formula(count, seed):
    """`count` numbers in [-1, 1): a hash of the index and the seed."""
    x = np.arange(count, dtype=np.uint32) + np.uint32(seed * 0x9E3779B9 % 2**32)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    x = x ^ (x >> np.uint32(16))
    return ((x >> np.uint32(8)).astype(np.float64) / 2**23 - 1).astype(np.float32)


def weights_by_formula(network):
    """Weights of a state dict, by name in alphabetical order."""
    state = network.state_dict()
    for seed, name in enumerate(sorted(name for name in state if "num_batches" not in name)):
        shape = state[name].shape
        numbers = torch.from_numpy(formula(int(np.prod(shape)), seed)).reshape(shape)
        if name.endswith("conv.weight"):
            numbers = numbers * np.float32(np.sqrt(6 / np.prod(shape[1:])))
        elif name.endswith("bn.weight"):
            numbers = 1 + numbers / 8
        elif name.endswith("running_var"):
            numbers = 1 + numbers / 2
        elif name.endswith("fc.weight"):
            numbers = numbers / 32
        else:
            numbers = numbers / 8
        state[name] = numbers.float()
    return state


def build():
    shapes = {}

    def instead_of_a_download(*_, **__):
        return shapes["weights"]

    # The state dict's names and shapes, before there are weights.
    inception.load_state_dict_from_url = instead_of_a_download
    load = torch.nn.Module.load_state_dict
    found = {}
    torch.nn.Module.load_state_dict = lambda self, *_, **__: found.setdefault("network", self)
    shapes["weights"] = {}
    inception.fid_inception_v3()
    torch.nn.Module.load_state_dict = load
    shapes["weights"] = weights_by_formula(found["network"])
    network = inception.InceptionV3([3]).eval()
    return network, shapes["weights"]


def images(seed, count=6):
    """Bytes [N, 20, 24, 3] that differ in contrast and brightness."""
    numbers = formula(count * 20 * 24 * 3, seed).reshape(count, 20, 24, 3)
    contrast = np.linspace(0.2, 0.9, count, dtype=np.float32).reshape(-1, 1, 1, 1)
    return np.clip(128 + 127 * contrast * numbers, 0, 255).astype(np.uint8)


def main():
    torch.manual_seed(0)
    a = formula(60 * 8, 1).reshape(60, 8)
    b = formula(60 * 8, 2).reshape(60, 8) * 0.75 + 0.125
    moments = lambda x: (x.mean(0), np.cov(x, rowvar=False))
    ta, tb = torch.from_numpy(a), torch.from_numpy(b)
    kid = kid_features_to_metric(
        ta.double(), tb.double(), kid_subsets=1, kid_subset_size=60, rng_seed=0, verbose=False
    )
    prc = prc_features_to_metric(ta, tb, prc_neighborhood=3, prc_batch_size=100, verbose=False)
    logits = torch.from_numpy(formula(97 * 10, 3).reshape(97, 10) * 4)
    isc = isc_features_to_metric(logits, splits=10, shuffle=False)

    network, state = build()
    head = state["fc.weight"]
    features = []
    with torch.no_grad():
        for seed in (4, 5):
            x = torch.from_numpy(images(seed)).permute(0, 3, 1, 2).float() / 255
            features.append(network(x)[0].flatten(1))
    both = [moments(f.numpy()) for f in features]
    golden = {
        "versions": {
            name: version(name)
            for name in ("torch", "torchvision", "pytorch-fid", "torch-fidelity", "scipy", "numpy")
        },
        "frechet": fid_score.calculate_frechet_distance(*moments(a), *moments(b)),
        "kernel": kid["kernel_inception_distance_mean"],
        "precision": prc["precision"],
        "recall": prc["recall"],
        "inception_score": [isc["inception_score_mean"], isc["inception_score_std"]],
        "inception": {
            "convolutions": {
                name.removesuffix(".conv.weight"): list(tensor.shape)
                for name, tensor in state.items()
                if name.endswith("conv.weight")
            },
            "features": [[float(v) for v in row[::16]] for row in features[0][:2]],
            "logits": [[float(v) for v in row[::16]] for row in (features[0] @ head.T)[:2]],
            "fid": float(fid_score.calculate_frechet_distance(*both[0], *both[1])),
        },
    }
    path = Path(__file__).with_name("evaluation.json")
    path.write_text(json.dumps(golden) + "\n")
    print({key: golden[key] for key in ("frechet", "kernel", "precision", "recall", "inception_score")})
    print(golden["inception"]["fid"], features[0].std(), features[0].mean())


if __name__ == "__main__":
    main()
