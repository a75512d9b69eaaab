"""cuDNN's attention, as JAX has it: for a call that asks for it by name. No call takes it by itself, as it is not measured yet."""
