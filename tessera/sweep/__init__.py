"""Search over the choices of a run, judged on the validation part."""
