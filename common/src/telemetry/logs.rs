//! Structured logs on standard error, and the tracer that gives every span its ids.

use std::{
    fmt,
    io::{self, IsTerminal as _},
};

use opentelemetry::{Context, trace::TraceContextExt as _, trace::TracerProvider as _};
use opentelemetry_sdk::trace::SdkTracerProvider;
use serde::Serialize;
use serde_json::{Map, Value};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{ParseError, filter_fn},
    fmt::{
        FmtContext, FormatEvent, FormatFields, FormattedFields, MakeWriter,
        format::{JsonFields, Writer},
        time::{FormatTime as _, SystemTime as Timestamp},
    },
    layer::SubscriberExt as _,
    registry::LookupSpan,
    util::{SubscriberInitExt as _, TryInitError},
};

/// What is logged when nothing is said: changes of state, and all that is odd.
const DEFAULT_FILTER: &str = "info";

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for a person.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// The flags of logging, to be flattened into a daemon's arguments.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct LogOptions {
    /// How logs are written.
    #[arg(long = "log-format", value_enum, default_value_t, env = "MARCOT_LOG_FORMAT")]
    pub format: LogFormat,

    /// What is logged, as `info` or `warn,marcot_donor=debug`; else RUST_LOG's value, else `info`.
    #[arg(id = "log", long = "log", value_name = "FILTER", env = "MARCOT_LOG")]
    pub filter: Option<String>,
}

/// Why telemetry does not start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is wrong.
    #[error("log filter `{filter}` (--log, MARCOT_LOG or RUST_LOG): {source}")]
    Filter {
        /// What was given.
        filter: String,
        /// What is wrong with it.
        source: ParseError,
    },
    /// It has started already.
    #[error("start logging: {0}")]
    Started(#[from] TryInitError),
}

/// Telemetry that runs; [`Telemetry::shutdown`] hands over what is still held.
#[derive(Debug)]
pub struct Telemetry {
    provider: SdkTracerProvider,
}

impl Telemetry {
    /// Ends tracing. An error is no reason for another exit code: it is logged.
    pub fn shutdown(self) {
        if let Err(error) = self.provider.shutdown() {
            tracing::warn!(%error, "tracing did not end in order");
        }
    }
}

/// Starts logs and tracing for this process; `service` names the tracer. Once, before all else.
pub fn init(service: &'static str, options: &LogOptions) -> Result<Telemetry, TelemetryError> {
    let filter = match &options.filter {
        Some(filter) => filter.clone(),
        None => std::env::var("RUST_LOG")
            .ok()
            .filter(|filter| !filter.is_empty())
            .unwrap_or_else(|| DEFAULT_FILTER.to_owned()),
    };
    let provider = SdkTracerProvider::builder().build();
    subscriber(service, options.format, &filter, &provider, io::stderr)?.try_init()?;
    Ok(Telemetry { provider })
}

/// The layers, writing to `writer`.
pub(super) fn subscriber<W>(
    service: &'static str,
    format: LogFormat,
    filter: &str,
    provider: &SdkTracerProvider,
    writer: W,
) -> Result<impl Subscriber + Send + Sync + use<W>, TelemetryError>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let filter = EnvFilter::builder()
        .parse(filter)
        .map_err(|source| TelemetryError::Filter { filter: filter.to_owned(), source })?;
    // A filter of its own: a quiet log must not take the spans away that carry the trace context.
    let traces = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer(service))
        .with_filter(filter_fn(|metadata| metadata.is_span() && *metadata.level() <= Level::INFO));
    let logs = match format {
        LogFormat::Text => tracing_subscriber::fmt::layer()
            .with_ansi(io::stderr().is_terminal())
            .with_writer(writer)
            .boxed(),
        LogFormat::Json => tracing_subscriber::fmt::layer()
            .fmt_fields(JsonFields::new())
            .event_format(JsonLines)
            .with_writer(writer)
            .boxed(),
    };
    // The traces come first, so that the context of a span is there when a line is written.
    Ok(tracing_subscriber::registry().with(traces).with(logs.with_filter(filter)))
}

/// One line; the order of the fields is the order in the line.
#[derive(Serialize)]
struct Line<'a> {
    timestamp: String,
    level: &'a str,
    target: &'a str,
    message: String,
    fields: Map<String, Value>,
    /// Outermost first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    spans: Vec<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    span_id: Option<String>,
}

/// Writes events as JSON lines.
struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut timestamp = String::new();
        Timestamp.format_time(&mut Writer::new(&mut timestamp))?;
        let mut fields = Fields::default();
        event.record(&mut fields);
        let spans = context.event_scope().into_iter().flat_map(|scope| scope.from_root());
        let spans = spans
            .map(|span| {
                let extensions = span.extensions();
                let mut fields: Map<String, Value> = extensions
                    .get::<FormattedFields<N>>()
                    .and_then(|fields| serde_json::from_str(fields).ok())
                    .unwrap_or_default();
                fields.insert("name".to_owned(), span.name().into());
                Value::Object(fields)
            })
            .collect();
        let current = Context::current();
        let span = current.span();
        let ids = Some(span.span_context()).filter(|ids| ids.is_valid());
        let line = Line {
            timestamp,
            level: event.metadata().level().as_str(),
            target: event.metadata().target(),
            message: fields.message,
            fields: fields.others,
            spans,
            trace_id: ids.map(|ids| ids.trace_id().to_string()),
            span_id: ids.map(|ids| ids.span_id().to_string()),
        };
        let line = serde_json::to_string(&line).map_err(|_| fmt::Error)?;
        writeln!(writer, "{line}")
    }
}

/// Collects an event's fields.
#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl Fields {
    fn add(&mut self, field: &Field, value: impl Into<Value>) {
        self.others.insert(field.name().to_owned(), value.into());
    }

    fn add_text(&mut self, field: &Field, text: String) {
        if field.name() == "message" {
            self.message = text;
        } else {
            self.add(field, text);
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add_text(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add_text(field, value.to_owned());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, value);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::{Arc, Mutex};

    use tracing::{info, info_span, warn};

    use super::*;

    /// Lines that were written.
    #[derive(Clone, Default)]
    pub(in crate::telemetry) struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Lines {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }

        fn json(&self) -> Vec<Value> {
            self.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
        }
    }

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A subscriber that logs from WARN on, and its lines.
    pub(in crate::telemetry) fn quiet(
        format: LogFormat,
        filter: &str,
    ) -> (impl Subscriber + Send + Sync + use<>, Lines) {
        let lines = Lines::default();
        let provider = SdkTracerProvider::builder().build();
        let writer = lines.clone();
        let made = subscriber("test", format, filter, &provider, move || writer.clone());
        (made.unwrap(), lines)
    }

    #[test]
    fn a_json_line_has_time_level_target_fields_spans_and_trace() {
        let (subscriber, lines) = quiet(LogFormat::Json, "info");
        tracing::subscriber::with_default(subscriber, || {
            let _span = info_span!("clone", clone = "c-1").entered();
            info!(bytes = 7_u64, path = "a\nb", ratio = f64::NAN, "stage finished");
        });
        let [line] = &lines.json()[..] else { panic!("{}", lines.text()) };
        assert!(line["timestamp"].as_str().unwrap().ends_with('Z'));
        assert_eq!(line["level"], "INFO");
        assert!(line["target"].as_str().unwrap().starts_with("marcot_common::telemetry"));
        assert_eq!(line["message"], "stage finished");
        assert_eq!(line["fields"]["bytes"], 7);
        assert_eq!(line["fields"]["path"], "a\nb");
        assert_eq!(line["spans"][0]["name"], "clone");
        assert_eq!(line["spans"][0]["clone"], "c-1");
        assert_eq!(line["trace_id"].as_str().unwrap().len(), 32);
        assert_eq!(line["span_id"].as_str().unwrap().len(), 16);
    }

    #[test]
    fn a_quiet_log_still_knows_its_trace() {
        let (subscriber, lines) = quiet(LogFormat::Json, "warn");
        tracing::subscriber::with_default(subscriber, || {
            let _span = info_span!("clone").entered();
            info!("not written");
            warn!("written");
        });
        let [line] = &lines.json()[..] else { panic!("{}", lines.text()) };
        assert_eq!(line["message"], "written");
        assert!(line["trace_id"].is_string(), "{line}");
    }

    #[test]
    fn a_line_outside_of_spans_has_no_trace() {
        let (subscriber, lines) = quiet(LogFormat::Json, "info");
        tracing::subscriber::with_default(subscriber, || info!("alone"));
        assert!(lines.json()[0].get("trace_id").is_none());
    }

    #[test]
    fn text_lines_have_fields_and_no_colour_beside_a_terminal() {
        let (subscriber, lines) = quiet(LogFormat::Text, "info,marcot_common=warn");
        tracing::subscriber::with_default(subscriber, || {
            info!("not written");
            warn!(bytes = 7, "written");
        });
        let text = lines.text();
        assert!(text.contains("WARN") && text.contains("written bytes=7"), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }

    #[test]
    fn a_wrong_filter_is_named() {
        let provider = SdkTracerProvider::builder().build();
        let made = subscriber("test", LogFormat::Text, "marcot=loud", &provider, io::sink);
        let error = made.err().unwrap().to_string();
        assert!(error.contains("`marcot=loud`") && error.contains("MARCOT_LOG"), "{error}");
    }
}
