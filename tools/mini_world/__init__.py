"""The miniature world: captioned scenes of simple things in named places, with exact masks."""
