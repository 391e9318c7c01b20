//! The span of the stage that runs, beneath the clone's own.
//!
//! Where nobody is told of spans they are not made, and the clone's own is there for the logs.

use std::sync::{Mutex, MutexGuard, PoisonError};

use marcot_common::{
    failure::Failure,
    telemetry::spans::{BYTES, CLONE, fail, set_number},
};
use marcot_proto::common::v1::Stage;
use tracing::{Span, debug_span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use crate::counts::stage_label;

/// The spans of one clone.
#[derive(Debug)]
pub struct StageSpan(Mutex<Spans>);

#[derive(Debug)]
struct Spans {
    clone: Span,
    stage: Option<(Stage, Span)>,
}

impl Default for StageSpan {
    fn default() -> Self {
        Self(Mutex::new(Spans { clone: Span::none(), stage: None }))
    }
}

impl StageSpan {
    /// All stages are beneath this span from now on.
    pub fn set_clone(&self, clone: Span) {
        self.lock().clone = clone;
    }

    /// Nothing more is beneath it: one that is held here does not end.
    pub fn release(&self) {
        *self.lock() = Spans { clone: Span::none(), stage: None };
    }

    /// The clone's own.
    #[must_use]
    pub fn clone_span(&self) -> Span {
        self.lock().clone.clone()
    }

    /// That of the stage that runs; the clone's own between two of them.
    #[must_use]
    pub fn current(&self) -> Span {
        let spans = self.lock();
        spans.stage.as_ref().map_or(&spans.clone, |(_, span)| span).clone()
    }

    /// A stage begins, or goes on.
    pub fn begin(&self, clone: &str, stage: Stage) {
        let mut spans = self.lock();
        if spans.stage.as_ref().is_some_and(|(present, _)| *present == stage) {
            return;
        }
        let [(_, label)] = stage_label(stage);
        let name = label.replace('_', " ");
        let parent = &spans.clone;
        let span = debug_span!(parent: parent, "stage", otel.name = name, marcot.stage = label);
        span.set_attribute(CLONE, clone.to_owned());
        spans.stage = Some((stage, span));
    }

    /// What the stage that runs has copied.
    pub fn end(&self, bytes: impl FnOnce(Stage) -> u64, failure: Option<&Failure>) {
        let Some((stage, span)) = self.lock().stage.take() else { return };
        set_number(&span, BYTES, bytes(stage));
        if let Some(failure) = failure {
            fail(&span, failure);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Spans> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
