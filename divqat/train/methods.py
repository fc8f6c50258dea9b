"""The methods of training: the defense, its control, and what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """What distinguishes a method.

    Attributes:
        help: one line of the command line's help.
        quantized: gives an int8 model, from the teacher's weights; else a full-precision one, from
            new weights.
        divergence_sign: s of L = CE − s · λ T² D(model, teacher): 1 moves away from the teacher's
            answers, −1 towards them, 0 does not ask for them.
        weight, direction: λ and D where the settings leave them open.
    """

    help: str
    quantized: bool
    divergence_sign: int = 0
    weight: float = 0.15
    direction: str = "student_teacher"

    @property
    def taught(self) -> bool:
        """Whether it starts or learns from a teacher."""
        return self.quantized or self.divergence_sign != 0


# nasty: Nasty Teacher (Ma et al., "Undistillable: Making a nasty teacher that cannot teach
#   students", ICLR 2021, arXiv 2105.07381, §3): L = CE(y, q) − ω τ² KL(q_τ‖p_τ) against a frozen
#   network of the same architecture. τ = 4 and ω = 0.04 are those of the authors' code for
#   CIFAR-10; it takes τ = 20 and ω = 0.005 for CIFAR-100. Initial weights are not the teacher's
#   even under the same seed (see build_model).
# ini: see divqat.nn.ini. Of full precision, as its authors have it; ptq takes it as it is, qat
#   learns on from it without its loss.
# ptq: ranges as moving averages, over frozen weights with the BatchNorm folded in (Krishnamoorthi,
#   "Quantizing deep convolutional networks for efficient inference", arXiv 1806.08342, 2018, §3).
# kd-qat: L = CE(y, q) + λ T² KL(p_T‖q_T) (Hinton et al., "Distilling the knowledge in a neural
#   network", NIPS workshop 2014, arXiv 1503.02531, §2, there between nets of different size; Mishra
#   and Marr, "Apprentice", ICLR 2018, for quantized students). Hinton et al. weigh CE less than the
#   other term and give no number; λ = 1 weighs both alike.
METHODS = {
    "fp": Method("full precision", quantized=False),
    "nasty": Method(
        "full precision and hard to distill, a Nasty Teacher: from new weights, away from the "
        "teacher's answers",
        quantized=False,
        divergence_sign=1,
        weight=0.04,
    ),
    "ini": Method(
        "full precision and trained against a simulated thief (InI), from new weights",
        quantized=False,
    ),
    "ptq": Method(
        "post-training quantization: ranges are observed, no weight changes", quantized=True
    ),
    "qat": Method("plain quantization-aware training, the undefended control", quantized=True),
    "kd-qat": Method(
        "quantization-aware training towards the teacher's answers, the defense's mirror image",
        quantized=True,
        divergence_sign=-1,
        weight=1.0,
        direction="teacher_student",
    ),
    "divqat": Method(
        "quantization-aware training with the defense", quantized=True, divergence_sign=1
    ),
}
