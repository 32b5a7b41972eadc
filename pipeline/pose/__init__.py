"""Where joints are and how pixels get there: skeletons, crops, augmentation. numpy and cv2 only, no torch."""
