"""Makes the reference numbers of the tests: what diffusers and transformers compute in place of bas's networks."""
