"""The sections of a job config as dataclasses. The text under a field is the help of that key."""
