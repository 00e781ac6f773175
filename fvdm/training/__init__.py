"""The training loop, the state of a run, the ZeRO-2 engine, EMA and previews."""
