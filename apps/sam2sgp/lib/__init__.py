"""The MONAI Label app: rooms over a few modules that all of them use.

    http            what clients reach: routes, the checks before them, pages, connections, the log
    infers          a request's image → a label file
    trainers        fine-tuning on the approved labels, adaptation to them
    activelearning  which image to label next
    tasks           training, scoring and batch inference in processes of their own
    serving         the network that stays loaded, its support set and weights; the options of requests
    stores          images and labels: folder, DICOMweb archive, sessions; what is let in, and who decided what

A room imports only what stands below it, `make lint` checks that. Below all rooms stand the modules of this folder.
"""
