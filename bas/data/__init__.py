"""From a scene folder to the batches of a training step: photographs, masks, handles, and what is drawn from them."""
