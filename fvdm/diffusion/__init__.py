"""The paper, as pure functions: timesteps, the noise process, tasks as schedules, and the one sampling loop."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["NUM_TIMESTEPS", "DiffusionConfig"],
        "process": ["Diffusion"],
        "sampling": ["SamplerConfig", "sample"],
        "solvers": ["solver"],
        "tasks": ["TASKS", "TaskSpec"],
        "timesteps": ["full_sequence", "hold_clean", "sample_timesteps"],
    },
)
