"""Stage two: the distiller, the trainer around it, its batches and targets, and the folder of a run."""
