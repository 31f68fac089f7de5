"""Policy: device, batch, order, refusals, predictions. Pure: no tensor, thread, clock or socket."""
