"""Detection and segmentation: COCO data, drawn shapes, the task, torchvision's detectors."""
