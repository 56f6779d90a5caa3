"""How the things that the workbook ships were made: its model, its checkpoints and its notebooks."""
