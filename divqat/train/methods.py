"""The training methods: the defense, its control, and the baselines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """The properties of a training method.

    Attributes:
        help: its description on the command line.
        quantized: trains an int8 model, starting from the teacher's weights; otherwise a
            full-precision model from new weights.
        divergence_sign: s of L = CE − s · λ T² D(model, teacher): 1 moves the model's answers away
            from the teacher's, −1 towards them, 0 leaves the divergence out.
        weight, temperature, direction: the defaults of λ, T and D.
    """

    help: str
    quantized: bool
    divergence_sign: int = 0
    weight: float = 0.15
    temperature: float = 4.0
    direction: str = "student_teacher"

    @property
    def needs_teacher(self) -> bool:
        """Whether it starts from a teacher's weights or learns from its answers."""
        return self.quantized or self.divergence_sign != 0


# nasty: Nasty Teacher (Ma et al., "Undistillable: Making a nasty teacher that cannot teach
#   students", ICLR 2021, arXiv 2105.07381, §3): L = CE(y, q) − ω τ² KL(q_τ‖p_τ) against a frozen
#   network of the same architecture. τ = 4 and ω = 0.04 are from the authors' code for CIFAR-10,
#   which uses τ = 20 and ω = 0.005 for CIFAR-100. The initial weights differ from the teacher's
#   even with the same seed (see build_model).
# ini: see divqat.nn.ini. Full precision, as in the paper; ptq quantizes the result unchanged, qat
#   continues from it without the loss of InI.
# misleader: see divqat.nn.misleader. Full precision, as in the paper, and as for ini. λ is the
#   paper's α here, and the cross-entropy counts 1 − α. α = 0.3 and T = 6 are those of the authors'
#   script for ResNet-18 on CIFAR-10.
# ensemble: of MISLEADER, but members may come from any full-precision method. ptq quantizes the
#   members unchanged; qat trains them on, with the cross-entropy of their mean probabilities.
# ptq: ranges are moving averages; weights are frozen, with BatchNorm folded in (Krishnamoorthi,
#   "Quantizing deep convolutional networks for efficient inference", arXiv 1806.08342, 2018, §3).
# kd-qat: L = CE(y, q) + λ T² KL(p_T‖q_T) (Hinton et al., "Distilling the knowledge in a neural
#   network", NIPS workshop 2014, arXiv 1503.02531, §2, between networks of different sizes; Mishra
#   and Marr, "Apprentice", ICLR 2018, for quantized students). Hinton et al. give CE a smaller
#   weight than the other term, without a number; λ = 1 weights both equally.
METHODS = {
    "fp": Method("full precision", quantized=False),
    "nasty": Method(
        "full precision and hard to distill (Nasty Teacher): from new weights, away from the "
        "teacher's answers",
        quantized=False,
        divergence_sign=1,
        weight=0.04,
    ),
    "ini": Method(
        "full precision, trained against a simulated thief (InI), from new weights",
        quantized=False,
    ),
    "misleader": Method(
        "full precision, distilled from the teacher into new weights, against a simulated thief "
        "that learns (MISLEADER)",
        quantized=False,
        divergence_sign=-1,
        weight=0.3,
        temperature=6.0,
        direction="teacher_student",
    ),
    "ensemble": Method(
        "the ensemble of the full-precision trainings members, untrained (epochs 0)",
        quantized=False,
    ),
    "ptq": Method(
        "post-training quantization: observes ranges; see the flags of that name for more",
        quantized=True,
    ),
    "qat": Method("plain quantization-aware training, the undefended control", quantized=True),
    "kd-qat": Method(
        "quantization-aware training towards the teacher's answers (distillation)",
        quantized=True,
        divergence_sign=-1,
        weight=1.0,
        direction="teacher_student",
    ),
    "divqat": Method(
        "quantization-aware training with the defense", quantized=True, divergence_sign=1
    ),
}
