"""The claims of the paper put to the test: the experiments behind docs/evidence.md."""
