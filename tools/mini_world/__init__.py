"""The miniature world: captioned scenes of simple objects in named places, with exact masks."""
