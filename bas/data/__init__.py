"""From a scene folder to the batches of a training step.

mask_formats.py reads masks, scene_folder.py reads a scene, batches.py samples what a step trains on.
"""
