"""Writes objective.safetensors: DKDM's loss and its gradient, worked out by guided-diffusion's own code.

    git clone https://github.com/openai/guided-diffusion
    pip install torch numpy safetensors
    python distill/tests/golden/make_objective.py --guided-diffusion guided-diffusion

Means, variances and the divergence are guided-diffusion's `p_mean_variance` and `normal_kl`, put together
as its `_vb_terms_bpd` does, with the teacher in the place of the true posterior and the divergence at
t = 0 too, which is what DKDM changes. All in f32, as guided-diffusion trains; `x`, `teacher`, `student` and
`gradient` are `[B, C or 2C, H, W]`, losses have one element.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

OUT = Path(__file__).parent / "objective.safetensors"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--guided-diffusion", required=True, help="a checkout")
    sys.path.insert(0, parser.parse_args().guided_diffusion)
    from guided_diffusion import gaussian_diffusion as gd
    from guided_diffusion.losses import normal_kl
    from guided_diffusion.nn import mean_flat

    diffusion = gd.GaussianDiffusion(
        betas=gd.get_named_beta_schedule("cosine", 1000),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE,
        loss_type=gd.LossType.MSE,
    )
    generator = torch.Generator().manual_seed(1)
    timesteps = torch.tensor([0, 1, 2, 37, 500, 930, 998, 999])
    rows, channels = len(timesteps), 2
    draw = lambda c: torch.randn(rows, c, 4, 4, generator=generator)
    x = draw(channels)
    teacher = draw(2 * channels)
    # Close to its teacher, as a student is but for its first steps.
    student = teacher + 0.1 * draw(2 * channels)
    student.requires_grad_(True)

    simple = mean_flat((teacher[:, :channels] - student[:, :channels]) ** 2)
    frozen = torch.cat([student[:, :channels].detach(), student[:, channels:]], dim=1)
    of = lambda answer, clip: diffusion.p_mean_variance(
        lambda *_, **__: answer, x, timesteps, clip_denoised=clip
    )
    true, learned = of(teacher, True), of(frozen, False)
    kl = normal_kl(
        true["mean"], true["log_variance"], learned["mean"], learned["log_variance"]
    )
    vlb = mean_flat(kl) / math.log(2.0)
    (simple.mean() + vlb.mean()).backward()
    save_file(
        {
            "x": x,
            "timesteps": timesteps,
            "teacher": teacher,
            "student": student.detach().contiguous(),
            "simple": simple.mean().detach().reshape(1),
            "vlb": vlb.mean().detach().reshape(1),
            "gradient": student.grad,
        },
        OUT,
        metadata={"torch": torch.__version__, "guided-diffusion": "22e0df8"},
    )


main()
