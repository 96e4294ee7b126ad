"""One frozen object describes a run: the sections of the floors below, YAML, and `section.key=value`."""
