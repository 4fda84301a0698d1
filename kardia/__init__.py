"""The rooms off kardia_lite.py's corridor: llama.cpp, the judge's exam, export, report, importers, memory plan."""
