"""The report of a run, and of a folder of runs, from their files alone: `report.md` and `report.html`."""
