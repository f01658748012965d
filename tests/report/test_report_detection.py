from __future__ import annotations

from report_runs import make_run

from slope_compile.report.page import render

FIGURES = {"mask_map": 0.3104, "box_map": 0.3512}
OF_A_MODEL = {"fp32": 0.3201, "compressed": 0.3104, "onnx": 0.3103}
OF_BOXES = {"fp32": 0.3605, "compressed": 0.3512, "onnx": None}


def page() -> str:
    plain = make_run()
    assert plain.metrics is not None
    dropped = ("accuracy", "validation_loss")
    epochs = [{**{k: v for k, v in epoch.items() if k not in dropped}, **FIGURES} for epoch in plain.metrics["epochs"]]
    metrics = {**plain.metrics, "epochs": epochs, "fp32": FIGURES, "compressed": FIGURES}
    others = {"box_map": OF_BOXES}
    run = make_run(metrics=metrics, metric="mask_map", accuracies=OF_A_MODEL, other_metrics=others, verdicts={})
    return render(run).replace("\N{NO-BREAK SPACE}", " ")


def test_a_detectors_page_names_its_own_metrics_and_no_accuracy() -> None:
    shown = page()
    assert "Mean average precision" in shown and "Accuracy" not in shown and "beside the mask mAP" in shown
    for text in ("Mask mAP on the validation images", "Box mAP on the validation images", "32.01 %", "36.05 %"):
        assert text in shown
    assert "Mask mAP, compressed" in shown and "Validation mask mAP over 7 epochs, last 31.04 %" in shown
    assert "not measured" in shown  # the boxes of the ONNX file


def test_a_detector_has_no_validation_loss_to_show() -> None:
    shown = page()
    assert "alidation loss" not in shown
    assert "Validation loss" in render(make_run())
