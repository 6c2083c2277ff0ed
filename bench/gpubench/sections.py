"""The sections in their order, and their seconds; together the least ones fit nine minutes."""

from .schedule import Section

SECTIONS = {
    section.name: section
    for section in (
        Section("build", 60, 150, "steps:build"),
        Section("ceilings", 12, 20, "ceilings:run"),
        Section("compile_kernels", 40, 70, "warm:run"),
        Section("tests", 100, 180, "steps:tests"),
        Section("elementwise", 25, 40, "elementwise:run"),
        Section("convolutions", 80, 120, "convolutions:run"),
        Section("chains", 15, 30, "chains:run"),
        Section("models", 45, 90, "models:run"),
        Section("torch_compile", 80, 240, "compiled:run"),
        Section("sanitizer", 60, 120, "steps:sanitizer"),
    )
}
