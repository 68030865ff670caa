"""Who gives scores. A teacher is one class with a `type`; see `base.Teacher`."""
