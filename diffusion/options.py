"""The options of diffusion sampling, with their defaults and bounds. Imports no torch, so the command line reads it too."""

from __future__ import annotations

import dataclasses

PRECISIONS = ("fp32", "bf16")
MAX_ETA = {"dpm-solver++": 10.0, "ddim": 1.0, "ddpm": 0.0}  # the samplers, and the largest eta of each
DEFAULT_STEPS = 15  # this and the following values were chosen with benchmarks/samplers.py
CONDITIONAL_STEPS = 10  # of `dpm-solver++` with labels
UNCONDITIONAL_ETA = 2.5
CONDITIONAL_ETA = 0.5
SCRIPT_GUIDANCE = 2.5  # of the scripts for class-conditional samples: more correct digits than 1
MAX_GUIDANCE = 100  # far beyond the scale at which samples are still digits


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How a diffusion model is sampled. `None` stands for a default that depends on the model and the labels.

    Args:
        sampler: `dpm-solver++`, `ddim` or `ddpm` (ancestral sampling).
        steps: network evaluations, not counting the second one where guidance acts. Default: 15; of `dpm-solver++` with
            labels, 10; of `ddpm`, every timestep.
        guidance: guidance scale w, in 0..100: 0 is unconditional, 1 is plain class-conditional. See `DDPM.denoise`.
        eta: stochasticity: 0 is deterministic, 1 adds the noise of `ddpm`. At most 10 (`dpm-solver++`) or 1 (`ddim`).
            Default of `dpm-solver++`: 0.5 with labels, 2.5 without; of `ddim`: 0.
        precision: of the network evaluations, `fp32` or `bf16`.
    """

    sampler: str = "dpm-solver++"
    steps: int | None = None
    guidance: float = 1.0
    eta: float | None = None
    precision: str = "fp32"

    def resolved(self, timesteps: int, num_classes: int, with_labels: bool) -> SamplingOptions:
        """The same options with every default filled in, for a model of so many timesteps and classes.

        Raises:
            ValueError: an option is out of its bounds, or guidance is given for a model without classes.
        """
        _check_choice("sampler", self.sampler, tuple(MAX_ETA))
        _check_choice("precision", self.precision, PRECISIONS)
        solver = self.sampler == "dpm-solver++"
        conditional = with_labels and self.guidance > 0
        steps = self.steps
        if steps is None:
            steps = CONDITIONAL_STEPS if solver and conditional else DEFAULT_STEPS
            steps = timesteps if self.sampler == "ddpm" else min(steps, timesteps)
        if type(steps) is not int or not 1 <= steps <= timesteps:
            raise ValueError(f"steps must be an integer in 1..{timesteps}, the timesteps, not {steps!r}")
        _check_bounds("guidance", self.guidance, MAX_GUIDANCE)
        if self.guidance != 1 and not num_classes:
            raise ValueError("guidance needs classes, and this model is unconditional")
        eta = self.eta
        if eta is None:
            eta = (CONDITIONAL_ETA if conditional else UNCONDITIONAL_ETA) if solver else 0.0
        _check_bounds(f"eta of {self.sampler}", eta, MAX_ETA[self.sampler])
        return dataclasses.replace(self, steps=steps, eta=eta)


OPTION_NAMES = tuple(field.name for field in dataclasses.fields(SamplingOptions))


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _check_bounds(name: str, value: float, high: float) -> None:
    if not 0 <= value <= high:
        raise ValueError(f"{name} must lie in 0..{high}, not {value}")
