//! W3C trace context across the wire: `traceparent` and `tracestate` in gRPC's metadata.

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::{
    Context,
    propagation::{Extractor, Injector, TextMapPropagator as _},
    trace::TraceContextExt as _,
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::{Request, Status, metadata::MetadataMap, service::Interceptor};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// The caller's context; an empty one if the caller sent none, or nonsense.
#[must_use]
pub fn extract(metadata: &MetadataMap) -> Context {
    extract_headers(metadata.as_ref())
}

/// As [`extract`], from the headers of HTTP.
#[must_use]
pub fn extract_headers(headers: &HeaderMap) -> Context {
    // Not based on the context of this thread: another call's may be active.
    TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers))
}

/// Writes a context for the next service, over one that may be there; nothing if it has no trace.
pub fn inject(context: &Context, metadata: &mut MetadataMap) {
    let mut headers = HeadersMut(metadata.as_mut());
    TraceContextPropagator::new().inject_context(context, &mut headers);
}

/// Passes the trace of the calling code on.
pub fn inject_current(metadata: &mut MetadataMap) {
    inject(&Span::current().context(), metadata);
}

/// The id of the context's trace, 32 hexadecimal digits; `None` outside of traces.
#[must_use]
pub fn trace_id_of(context: &Context) -> Option<String> {
    let span = context.span();
    Some(span.span_context()).filter(|ids| ids.is_valid()).map(|ids| ids.trace_id().to_string())
}

/// The id of the trace that this code runs in.
#[must_use]
pub fn current_trace_id() -> Option<String> {
    trace_id_of(&Span::current().context())
}

/// Makes the caller's span the parent of `span`, which must not have been entered yet.
pub fn adopt(span: &Span, headers: &HeaderMap) {
    let caller = extract_headers(headers);
    if caller.span().span_context().is_valid() {
        // Without a tracer, as in a test, or if the span is not wanted, there is no one to tell.
        drop(span.set_parent(caller));
    }
}

/// Passes the trace of the calling code on with every call of a client.
#[derive(Debug, Clone, Copy, Default)]
pub struct TraceInterceptor;

impl Interceptor for TraceInterceptor {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        inject_current(request.metadata_mut());
        Ok(request)
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

struct HeadersMut<'a>(&'a mut HeaderMap);

impl Injector for HeadersMut<'_> {
    fn set(&mut self, key: &str, value: String) {
        let name = HeaderName::try_from(key);
        let value = HeaderValue::try_from(value);
        // The propagator writes an empty tracestate too; that would only cost bytes.
        if let (Ok(name), Ok(value)) = (name, value)
            && !value.is_empty()
        {
            self.0.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_context_survives_the_wire() {
        let mut metadata = MetadataMap::new();
        metadata.insert("traceparent", PARENT.parse().unwrap());
        metadata.insert("tracestate", "vendor=1".parse().unwrap());
        let context = extract(&metadata);
        assert_eq!(trace_id_of(&context).as_deref(), Some("4bf92f3577b34da6a3ce929d0e0e4736"));
        let mut next = MetadataMap::new();
        next.insert("traceparent", "stale".parse().unwrap());
        inject(&context, &mut next);
        assert_eq!(next.get("traceparent").unwrap(), PARENT);
        assert_eq!(next.get("tracestate").unwrap(), "vendor=1");
        assert_eq!(next.get_all("traceparent").iter().count(), 1);
    }

    #[test]
    fn nonsense_is_no_context_and_no_error() {
        let long = "0".repeat(4096);
        for text in ["", "x", "00-0-0-01", &PARENT.replace("4bf9", "zzzz"), &long] {
            let mut metadata = MetadataMap::new();
            metadata.insert("traceparent", text.parse().unwrap());
            assert_eq!(trace_id_of(&extract(&metadata)), None, "{text}");
        }
        let mut metadata = MetadataMap::new();
        inject(&Context::new(), &mut metadata);
        assert!(metadata.is_empty());
    }
}
