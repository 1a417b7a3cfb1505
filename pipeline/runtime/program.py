"""How this program starts itself: a run of a sweep, or the few steps of a plan, in a process of its own."""

# What Python is given in front of a command's arguments. Without the working folder on the path, where a file of the
# user's could bear the name of a library.
PROGRAM = ("-P", "-m", "coldstill.cli")
